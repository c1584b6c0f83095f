"""How many channels each level has: as a fraction of the network's, or as many as a budget allows."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.levels.nested import find_nestable
from elastic.measure import counts
from elastic.surgery.reindexing import reindex, resize_index
from elastic.widths.discovery import Widths

By = Literal["fraction", "macs", "latency_ms"]
STEPS = 12  # of bisection: fractions to within 1/4096


def level_sizes(
    net: nn.Module,
    widths: Widths,
    example: Tensor,
    levels: Sequence[float],
    by: By = "fraction",
    multiple: int = 1,
    latency_ms: Callable[[nn.Module], float] | None = None,
) -> list[dict[str, int]]:
    """The sizes of the levels below the network, all widths cut by the same fraction.

    Args:
        levels: ascending; fractions of the channels below 1, or budgets per input.
        by: what `levels` are; the largest fraction is taken that is within the budget.
        multiple: channels are rounded to a multiple of it (fractions to the nearest, budgets down), at
            least one multiple, or the whole width where that is less.
        latency_ms: measures a network, for budgets of latency.

    Raises:
        StructureError: levels that do not ascend, a fraction outside 0 … 1 or one that leaves a width
            without a channel, a budget that even one channel a width exceeds or that the network is within.
    """
    if by not in get_args(By):
        raise StructureError(f"levels are not given by '{by}': choose {', '.join(get_args(By))}")
    if by == "latency_ms" and latency_ms is None:
        raise StructureError("levels by latency_ms need a function that measures it: give one, or take macs")
    if multiple < 1:
        raise StructureError(f"channels cannot be multiples of {multiple}: set multiple to 1 or more")
    if not levels or any(small >= large for small, large in pairwise(levels)):
        raise StructureError(f"levels {list(levels)} do not ascend: give them from small to large")
    names = find_nestable(widths)
    if by == "fraction":
        return [_by_fraction(widths, names, fraction, multiple) for fraction in levels]

    def measure(sizes: dict[str, int]) -> float:
        cut = make_resized(net, widths, sizes)
        return (
            float(counts.count_macs(cut, example)) if by == "macs" or latency_ms is None else latency_ms(cut)
        )

    return [_within(widths, names, budget, multiple, measure, by) for budget in levels]


def make_resized(net: nn.Module, widths: Widths, sizes: dict[str, int]) -> nn.Module:
    """A network of these sizes: the first channels of this one, as a model of its own."""
    twin, its = copy.deepcopy(net), copy.deepcopy(widths)
    reindex(twin, its, {name: resize_index(widths[name].size, size) for name, size in sizes.items()})
    return twin


def _by_fraction(widths: Widths, names: Sequence[str], fraction: float, multiple: int) -> dict[str, int]:
    if not 0 < fraction < 1:
        raise StructureError(f"{fraction} is no fraction of a network's channels: give one between 0 and 1")
    sizes = {name: round(widths[name].size * fraction / multiple) * multiple for name in names}
    for name, size in sizes.items():
        if size == 0 and multiple == 1:
            raise StructureError(
                f"a fraction of {fraction} leaves width '{name}' of {widths[name].size} without a channel: "
                "ask for more"
            )
        sizes[name] = min(max(size, multiple), widths[name].size)
    return sizes


def _within(
    widths: Widths,
    names: Sequence[str],
    budget: float,
    multiple: int,
    measure: Callable[[dict[str, int]], float],
    by: str,
) -> dict[str, int]:
    def cut(fraction: float) -> dict[str, int]:
        fit = {name: int(widths[name].size * fraction) // multiple * multiple for name in names}
        return {name: min(max(size, multiple, 1), widths[name].size) for name, size in fit.items()}

    low, high = 0.0, 1.0
    if (least := measure(cut(low))) > budget:
        raise StructureError(
            f"no level is within {by}={budget:g}: {least:g} is the least; ask for more, or lower the multiple"
        )
    if (most := measure({name: widths[name].size for name in names})) <= budget:
        raise StructureError(
            f"the whole network takes {by}={most:g}: a level below it needs a smaller budget"
        )
    if measure(cut(high)) <= budget:
        return cut(high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(cut(middle)) <= budget else (low, middle)
    return cut(low)
