"""Time the networks of finished runs for one image: all in turn, on this machine as it is now.

A latency is of a network on a machine, so it is measured where networks are compared, from their saved
weights, and not while they train beside others. A network without modules counts with the fastest way that
stock PyTorch has for it, one with kernel activation modules with the execution that skips.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic.dynamic.skipping import make_masked, make_skipping
from elastic.experiments.tools.per_image import sample_images
from elastic.experiments.tools.restore import restore
from elastic.measure.timing import Network as Execution
from elastic.measure.timing import measure_times_ms

IMAGES = 100
TUNED_ON = 8  # images, for the execution that skips
Work = Callable[[], Any]


@dataclass(frozen=True)
class TimedNetwork:
    """Hold a network's executions, of which the fastest counts, its inputs, and its part of a summary."""

    row: dict[str, Any]
    executions: Sequence[Execution]
    inputs: Sequence[Tensor]


def make_stock(net: nn.Module) -> dict[str, Execution]:
    """Make the executions of stock PyTorch: as it is, and with norms folded in both memory formats."""
    return {
        "stock": net.eval(),
        "folded": make_masked(net, torch.contiguous_format),
        "channels_last": make_masked(net, torch.channels_last),
    }


def make_timed(folder: Path, summary: dict[str, Any]) -> Iterator[TimedNetwork]:
    """Make the network of a run ready to be timed: each of its levels, and each with each of its sets."""
    run = restore(folder)
    rows = summary.get("levels") or [summary]
    if not run.network.sets:
        noise = torch.randn(IMAGES, 1, *run.data.shape).unbind()  # what it sees makes no difference
        for k, row in enumerate(rows):
            yield TimedNetwork(row, list(make_stock(run.network.plain(k)).values()), noise)
        return
    images = sample_images(run.data, IMAGES).split(1)
    for k, row in enumerate(rows):
        for cell in row["sets"]:
            dynamic = run.network.dynamic(k, cell["set"])
            yield TimedNetwork(cell, [make_skipping(dynamic, images[:TUNED_ON])], images)


def time_runs(summaries: Mapping[Path, dict[str, Any]], clock: Callable[[], float] | None = None) -> str:
    """Write `latency_ms` into summaries, their levels and their sets; return how it was measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        networks = [timed for folder, summary in summaries.items() for timed in make_timed(folder, summary)]
        pairs = [(execution, timed.inputs) for timed in networks for execution in timed.executions]
        executions, inputs = map(list, zip(*pairs, strict=True))
        times = iter(measure_times_ms(executions, inputs, clock))
    finally:
        torch.set_num_threads(threads)
    spread = []
    for timed in networks:
        fastest = min((next(times) for _ in timed.executions), key=statistics.median)
        first, median, last = statistics.quantiles(fastest, n=4)
        timed.row["latency_ms"] = median
        spread.append((first / median, last / median))
    for summary in summaries.values():
        _inherit(summary)
    lower, upper = (100 * statistics.median(quartiles) for quartiles in zip(*spread, strict=True))
    return (
        f"latency: one image, one thread, median of {IMAGES}, {len(networks)} networks in turn in one "
        f"process; half of the times of a network lie within {lower:.0f} … {upper:.0f} % of its median"
    )


def _inherit(summary: dict[str, Any]) -> None:
    """Give a network the latency of its first set of modules, and of its largest level."""
    rows = summary.get("levels") or [summary]
    for row in rows:
        if row.get("sets"):
            row["latency_ms"] = row["sets"][0]["latency_ms"]
    summary |= {key: rows[-1][key] for key in ("latency_ms", "sets") if key in rows[-1]}


@dataclass(frozen=True)
class PairedTimes:
    """Hold the milliseconds of two sides that were timed in turn."""

    ours_ms: Sequence[float]
    theirs_ms: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """Divide ours by theirs, pair by pair."""
        return [ours / theirs for ours, theirs in zip(self.ours_ms, self.theirs_ms, strict=True)]

    def format_medians(self, digits: int) -> list[str]:
        """Write the median of each side and of the ratios, and the range of those."""
        ratios = self.ratios
        medians = [f"{statistics.median(side):.{digits}f}" for side in (self.ours_ms, self.theirs_ms)]
        return [
            *medians,
            f"{statistics.median(ratios):.{max(2, digits)}f}",
            f"{min(ratios):.2f} … {max(ratios):.2f}",
        ]


def time_pairs(ours: Work, theirs: Work, repeats: int) -> PairedTimes:
    """Time two sides in turn, after one unmeasured pair."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for work, side in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            work()
            side.append(1e3 * (time.perf_counter() - start))
    return PairedTimes(times[0][1:], times[1][1:])


def make_forward(net: Execution, x_BCHW: Tensor) -> Work:
    """Make a forward pass of a network to be timed."""

    def run() -> None:
        with torch.inference_mode():
            net(x_BCHW)

    return run
