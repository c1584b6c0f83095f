"""How long the networks of finished runs take for one image: all in turn, on this machine as it is now.

A latency is of a network on a machine, so it is measured where networks are compared, from their saved
weights, and not while they train beside others. A network without modules counts with the fastest way that
stock PyTorch has for it, one with kernel activation modules with the execution that skips.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic.dynamic.modules import select_set
from elastic.dynamic.skipping import make_skipping
from elastic.experiments.latency import TUNED_ON, some_images, stock
from elastic.experiments.tools.restore import restore, restore_switched
from elastic.levels.nested import Levels
from elastic.measure.timing import Network, measure_times_ms

IMAGES = 100


@dataclass(frozen=True)
class Timed:
    """A network in the ways it can be executed, its inputs, and the part of a summary that is about it."""

    row: dict[str, Any]
    ways: Sequence[Network]
    inputs: Sequence[Tensor]


def networks(folder: Path, summary: dict[str, Any]) -> Iterator[Timed]:
    """The network of a run, each of its levels, and each with each of its sets of modules."""
    net, data, _ = restore(folder)
    switched = restore_switched(net, folder, data)
    levels = list(net) if isinstance(net, Levels) else [net]
    rows = summary.get("levels") or [summary]
    if not switched:
        anything = torch.randn(IMAGES, 1, *data.shape).unbind()  # what is seen makes no difference
        for level, row in zip(levels, rows, strict=True):
            yield Timed(row, list(stock(level).values()), anything)
        return
    images = some_images(data, IMAGES).split(1)
    for gated, row in zip(switched, rows, strict=True):
        for each in row["sets"]:
            select_set(gated, each["set"])
            yield Timed(each, [make_skipping(gated, images[:TUNED_ON])], images)


def time_runs(summaries: Mapping[Path, dict[str, Any]]) -> str:
    """Write `latency_ms` into summaries, their levels and their sets; returns how it was measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [timed for folder, summary in summaries.items() for timed in networks(folder, summary)]
        ways = [(way, timed) for timed in found for way in timed.ways]
        took = measure_times_ms([way for way, _ in ways], [timed.inputs for _, timed in ways])
    finally:
        torch.set_num_threads(threads)
    spread = []
    for timed in found:
        own = [times for (_, other), times in zip(ways, took, strict=True) if other is timed]
        first, median, last = statistics.quantiles(min(own, key=statistics.median), n=4)
        timed.row["latency_ms"] = median
        spread.append((first / median, last / median))
    for summary in summaries.values():
        _pass_on(summary)
    low, high = (100 * statistics.median(part) for part in zip(*spread, strict=True))
    return (
        f"latency: one image, one thread, median of {IMAGES}, {len(found)} networks in turn in one process; "
        f"half of the times of a network lie within {low:.0f} … {high:.0f} % of its median"
    )


def _pass_on(summary: dict[str, Any]) -> None:
    """A network with sets of modules is known by the first of them, one with levels by its largest."""
    rows = summary.get("levels") or [summary]
    for row in rows:
        if row.get("sets"):
            row["latency_ms"] = row["sets"][0]["latency_ms"]
    summary |= {key: rows[-1][key] for key in ("latency_ms", "sets") if key in rows[-1]}
