"""Stop a level that is seen to be late, so that a smaller one can answer in its place.

A level from `make_alone` looks at the clock at some places; how far it is there was measured before.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

PLACES = 8  # at most, in a network
REPEATS = 5  # of a measurement; the fastest counts


class Late(Exception):
    """Say that a network would need longer than there is time, and how long."""

    def __init__(self, expected_ms: float) -> None:
        super().__init__(f"{expected_ms:.3g} ms are expected")
        self.expected_ms = expected_ms


class _Thread(threading.local):
    """Hold when the request of a thread has begun, and what it may take; None without a deadline."""

    start_s = 0.0
    left_ms: float | None = None


_thread = _Thread()


@contextmanager
def stop_when_late(left_ms: float | None) -> Iterator[None]:
    """Let marked networks raise `Late` meanwhile, in this thread, if they are not as far as they need be."""
    _thread.start_s, _thread.left_ms = time.perf_counter(), left_ms
    try:
        yield
    finally:
        _thread.left_ms = None


def mark_progress(net: fx.GraphModule, sample: Tensor) -> None:
    """Let a network look at the clock, in place, where equal parts of its time for the sample are over."""
    timer = _Timer(net)
    with torch.inference_mode():
        for _ in range(REPEATS):
            timer.run(sample)
    times = list(timer.times.values())
    parts = [done / sum(times) for done in accumulate(times)]
    reached = 0
    for node, part in zip(timer.times, parts, strict=True):
        if int(part * PLACES) > reached and node.op.startswith("call") and part < 1:
            reached = int(part * PLACES)
            with net.graph.inserting_after(node):
                net.graph.call_function(look, (part,))
    net.recompile()


def look(part: float) -> None:
    """Look at the clock when a part of the work is done.

    Raises:
        Late: at this speed the whole would take too long.
    """
    if _thread.left_ms is None:
        return
    expected_ms = 1e3 * (time.perf_counter() - _thread.start_s) / part
    if expected_ms > _thread.left_ms:
        raise Late(expected_ms)


class _Timer(fx.Interpreter):
    """Find the least time, in seconds, that each node takes in several runs."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.times: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        result = super().run_node(n)
        taken = time.perf_counter() - start
        self.times[n] = min(self.times.get(n, taken), taken)
        return result
