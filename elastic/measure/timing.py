"""Time networks on the same inputs: all in turn, on this machine as it is now."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from elastic.widths.inputs import Example, list_inputs

Network = Callable[..., Any]
N = TypeVar("N", bound=Network)
WARM_UP, REPEATS = 3, 5


def measure_times_ms(
    networks: Sequence[Network],
    inputs: Sequence[Sequence[Example]],
    clock: Callable[[], float] | None = None,
    settle_s: float = 0.0,
) -> list[list[float]]:
    """Measure the time of each network for each of its inputs.

    Args:
        clock: reads seconds; `time.process_time` leaves out what else runs on the machine.
        settle_s: for so long a network runs before it is measured. The threads of the one before it wait for
            more work, and keep cores busy, for some hundredths of a second.
    """
    clock = clock or time.perf_counter
    times_ms: list[list[float]] = [[] for _ in networks]
    calls = [[list_inputs(example) for example in examples] for examples in inputs]
    with torch.inference_mode():
        for network, (x, *_) in list(zip(networks, calls, strict=True)) * WARM_UP:
            network(*x)
        for batches in zip(*calls, strict=True):
            for network, x, times in zip(networks, batches, times_ms, strict=True):
                begin = time.perf_counter()
                while time.perf_counter() - begin < settle_s:
                    network(*x)
                start = clock()
                network(*x)
                times.append(1e3 * (clock() - start))
    return times_ms


def measure_medians_ms(
    networks: Sequence[Network],
    inputs: Sequence[Example],
    clock: Callable[[], float] | None = None,
    settle_s: float = 0.0,
) -> list[float]:
    """Measure the median time of each network over the same inputs, see `measure_times_ms`."""
    times_ms = measure_times_ms(networks, [inputs] * len(networks), clock, settle_s)
    return [statistics.median(times) for times in times_ms]


def choose_fastest(networks: Sequence[N], inputs: Sequence[Example]) -> N:
    """Choose the network that takes least time for the inputs."""
    medians = measure_medians_ms(networks, [*inputs] * REPEATS)
    return networks[medians.index(min(medians))]
