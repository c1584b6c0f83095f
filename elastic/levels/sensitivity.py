"""Measure what each width is worth, and size networks by it: what costs least goes first.

Each width is cut alone, to parts of its channels, the least important ones dropped; nothing is trained. That
tells what is lost by it and what is saved. Sizes for a budget follow greedily: of all cuts, the one with the
least added loss for what it saves, until the network is within. Losses of several widths add up only roughly.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn

from elastic.errors import FileError, OptionError, StructureError
from elastic.levels.importance import Importance, rank_channels, score_channels
from elastic.measure.counts import count_macs
from elastic.surgery.reindexing import reindex_copy
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.width import Widths

PARTS = (0.875, 0.75, 0.5, 0.25)  # of a width's channels


@dataclass(frozen=True)
class Evaluation:
    """Hold what a network does on held-out data: its loss, and a metric of which more is better."""

    loss: float
    metric: float


@dataclass(frozen=True)
class Cut:
    """Hold what becomes of a network if one width alone is cut.

    Attributes:
        channels: that are kept.
        loss: that is added.
        metric: that is lost.
        macs: that are saved, for one input.
        latency_ms: that is saved; 0 where it was not measured.
    """

    channels: int
    loss: float
    metric: float
    macs: float
    latency_ms: float = 0.0


Curves = Mapping[str, Sequence[Cut]]  # of each width, from whole to small
Evaluate = Callable[[nn.Module], Evaluation]


@torch.no_grad()
def measure_sensitivity(
    net: nn.Module,
    widths: Widths,
    example: Example,
    evaluate: Evaluate,
    parts: Sequence[float] = PARTS,
    importance: Importance = "l2",
    latency_ms: Callable[[nn.Module], float] | None = None,
) -> dict[str, list[Cut]]:
    """Measure for each width what keeping a part of it costs and saves.

    Args:
        evaluate: on held-out data; not on the test split, by which nothing may be chosen.
        parts: of the channels, descending.
        importance: which channels are kept, see `score_channels`.
        latency_ms: measures a network, where time matters.

    Raises:
        OptionError: parts that do not descend between 1 and 0.
    """
    descends = list(parts) == sorted(set(parts), reverse=True)
    if not parts or not descends or not 0 < parts[-1] <= parts[0] < 1:
        raise OptionError(f"parts {list(parts)} cannot be: give them between 1 and 0, descending")

    def measure(network: nn.Module) -> tuple[Evaluation, float, float]:
        time = latency_ms(network) if latency_ms is not None else 0.0
        return evaluate(network), float(count_macs(network, *list_inputs(example))), time

    uncut, macs, time = measure(net)
    scores = score_channels(net, widths, importance)
    curves = {}
    for name, width in widths.items():
        curve = [Cut(width.size, 0.0, 0.0, 0.0)]
        for channels in dict.fromkeys(max(1, round(part * width.size)) for part in parts):
            if channels < curve[-1].channels:
                result, cut_macs, cut_time = measure(keep_best(net, widths, {name: channels}, scores))
                added, lost = result.loss - uncut.loss, uncut.metric - result.metric
                curve.append(Cut(channels, added, lost, macs - cut_macs, time - cut_time))
        curves[name] = curve
    return curves


def keep_best(
    net: nn.Module, widths: Widths, sizes: Mapping[str, int], scores: Mapping[str, Tensor]
) -> nn.Module:
    """Make a network of these sizes, of the channels with the highest scores."""
    best = {name: rank_channels(scores[name], widths[name].size)[:size] for name, size in sizes.items()}
    return reindex_copy(net, widths, {name: channels.sort().values for name, channels in best.items()})[0]


def read_curves(path: str | Path) -> dict[str, list[Cut]]:
    """Read what `elastic sensitivity` has written.

    Raises:
        FileError: it is missing, damaged or something else.
    """
    try:
        rows = json.loads(Path(path).expanduser().read_text())
        curves = {str(name): [Cut(**cut) for cut in curve] for name, curve in rows.items()}
        if not all(curve and all(map(_is_cut, curve)) for curve in curves.values()):
            raise ValueError("a width without channels, or what is no number")
        return curves
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(
            f"{path} holds no sensitivity: make it with elastic sensitivity json={path}"
        ) from error


def _is_cut(cut: Cut) -> bool:
    return cut.channels >= 1 and all(map(isfinite, astuple(cut)))


def check_curves(curves: Curves, widths: Widths) -> None:
    """Refuse curves that are of another network.

    Raises:
        StructureError: a width has none, or one from another size.
    """
    for name, width in widths.items():
        if name not in curves or curves[name][0].channels != width.size:
            raise StructureError(
                f"nothing is known of width '{name}' with {width.size} channels: measure the sensitivity of "
                "this network"
            )


def fit_to_budget(
    curves: Curves,
    start: Mapping[str, int],
    budget: float,
    measure: Callable[[Mapping[str, int]], float],
    by: str = "macs",
    multiple: int = 1,
) -> dict[str, int]:
    """Choose sizes within a budget, cutting first what costs least for what it saves.

    Args:
        start: the sizes to cut from, such as those of a larger level.
        measure: what a network of some sizes takes, in units of the budget.
        by: what the budget is about, a field of `Cut`: macs or latency_ms.
        multiple: channels are multiples of it, or the whole width.

    Raises:
        StructureError: even with every width at its smallest the budget is exceeded.
    """
    sizes = dict(start)
    name, before = "", 0
    while (cost := measure(sizes)) > budget:
        cuts = list(_iterate_cuts(curves, sizes, by, multiple))
        if not cuts:
            raise StructureError(f"no sizes are within {by}={budget:g}: {cost:g} is the least; ask for more")
        _, _, name, channels = min(cuts)
        before, sizes[name] = sizes[name], channels
    if name:  # the last cut may have been deeper than it had to be
        for channels in range(sizes[name] + multiple, before, multiple):
            if measure({**sizes, name: channels}) > budget:
                break
            sizes[name] = channels
    return sizes


def _iterate_cuts(
    curves: Curves, sizes: Mapping[str, int], by: str, multiple: int
) -> Iterator[tuple[float, float, str, int]]:
    """Iterate over further cuts that save something: added loss a unit, units saved × -1, width, channels."""
    for name, size in sizes.items():
        curve = curves[name]
        for cut in curve:
            channels = max(multiple, cut.channels // multiple * multiple)
            saved = float(getattr(cut, by)) - _interpolate(curve, size, by)
            if channels < size and saved > 0:
                yield (cut.loss - _interpolate(curve, size, "loss")) / saved, -saved, name, channels


def _interpolate(curve: Sequence[Cut], size: int, key: str) -> float:
    """Return what a curve says of a size between two of its own."""
    small = next((cut for cut in curve if cut.channels <= size), curve[-1])
    large = next((cut for cut in reversed(curve) if cut.channels >= size), curve[0])
    if large.channels == small.channels:
        return float(getattr(small, key))
    part = (size - small.channels) / (large.channels - small.channels)
    return float(getattr(small, key)) * (1 - part) + float(getattr(large, key)) * part
