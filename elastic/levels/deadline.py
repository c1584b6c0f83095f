"""Stop a level that is seen to be late, so that a smaller one can answer in its place.

A level from `make_alone` looks at the clock after each part of a batch.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Late(Exception):
    """Say that a network would need longer than there is time, and how long."""

    def __init__(self, expected_ms: float) -> None:
        super().__init__(f"{expected_ms:.3g} ms are expected")
        self.expected_ms = expected_ms


class _Request(threading.local):
    """Hold when the request of this thread has begun, and what it may take; None without a deadline."""

    start_s = 0.0
    left_ms: float | None = None


_request = _Request()


@contextmanager
def stop_when_late(left_ms: float | None) -> Iterator[None]:
    """Let `check_deadline` raise `Late` meanwhile, in this thread, where networks would need longer."""
    _request.start_s, _request.left_ms = time.perf_counter(), left_ms
    try:
        yield
    finally:
        _request.left_ms = None


def check_deadline(part: float) -> None:
    """Look at the clock when a part of the work, more than 0 and at most 1, is done.

    Raises:
        Late: at this speed the whole would take too long.
    """
    if _request.left_ms is None:
        return
    expected_ms = 1e3 * (time.perf_counter() - _request.start_s) / part
    if expected_ms > _request.left_ms:
        raise Late(expected_ms)
