"""Size levels: as a fraction of the network's channels, or as many of them as a budget allows."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, get_args

from torch import nn

from elastic.errors import OptionError, StructureError
from elastic.levels.cutting import explain_no_room, find_nestable
from elastic.levels.sensitivity import Curves, check_curves, fit_to_budget
from elastic.measure import counts
from elastic.surgery.reindexing import reindex_copy, resize_index
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.matching import require_widths
from elastic.widths.width import Widths

By = Literal["fraction", "macs", "latency_ms"]
Measure = Callable[[tuple[int, ...]], float]
STEPS = 12  # of bisection: fractions to within 1/4096


def level_sizes(
    net: nn.Module,
    widths: Widths,
    example: Example,
    levels: Sequence[float],
    by: By = "fraction",
    multiple: int = 1,
    latency_ms: Callable[[nn.Module], float] | None = None,
    curves: Curves | None = None,
) -> list[dict[str, int]]:
    """Size the levels below the network: all widths cut by the same fraction, or as `curves` say.

    Args:
        levels: ascending; fractions of the channels below 1, or budgets per input.
        by: what `levels` are; the largest sizes are taken that are within the budget.
        multiple: channels are rounded to a multiple of it (fractions to the nearest, budgets down), at
            least one multiple, or the whole width where that is less.
        latency_ms: measures a network, for budgets of latency.
        curves: what each width costs and saves, from `measure_sensitivity`; for budgets alone.

    Raises:
        OptionError: levels that do not ascend, a fraction outside 0 … 1, a multiple below 1, a kind of budget
            that there is none of.
        StructureError: no width can be cut; a budget that even one channel a width exceeds, or that the
            network is within.
    """
    require_widths(net, widths)
    check_levels(levels, by, multiple, curves)
    if by == "latency_ms" and latency_ms is None:
        raise OptionError("levels by latency_ms need a function that measures it: give one, or take macs")
    names = find_nestable(widths)
    if not names:
        raise StructureError(f"{explain_no_room(widths)}: train this network without levels")
    if by == "fraction":
        return [_take_fraction(widths, names, fraction, multiple) for fraction in levels]

    @functools.cache
    def measure(sizes: tuple[int, ...]) -> float:
        resized = make_resized(net, widths, dict(zip(names, sizes, strict=True)))
        if by == "latency_ms" and latency_ms is not None:
            return latency_ms(resized)
        return float(counts.count_macs(resized, *list_inputs(example)))

    if curves is None:
        return [_fit_budget(widths, names, budget, multiple, measure, by) for budget in levels]
    check_curves(curves, widths)
    own_curves = {name: curves[name] for name in names}
    return _fit_curves(own_curves, levels, lambda part: measure(tuple(part.values())), by, multiple)


def make_resized(net: nn.Module, widths: Widths, sizes: dict[str, int]) -> nn.Module:
    """Make a network of these sizes: the first channels of this one, as a model of its own."""
    index = {name: resize_index(widths[name].size, size) for name, size in sizes.items()}
    return reindex_copy(net, widths, index)[0]


def check_levels(levels: Sequence[float], by: str, multiple: int, curves: Curves | None = None) -> None:
    """Refuse levels that no network has; see `level_sizes`.

    Raises:
        OptionError: they are such.
    """
    if by not in get_args(By):
        raise OptionError(f"levels are not given by '{by}': choose {', '.join(get_args(By))}")
    if curves is not None and by == "fraction":
        raise OptionError("sensitivity sizes levels for budgets: set by to macs or latency_ms")
    if not multiple >= 1 or multiple % 1:
        raise OptionError(f"channels cannot be multiples of {multiple}: set multiple to 1, 2, 3 or more")
    # From below all on, so that what is no number is no level either.
    if not levels or not all(small < large for small, large in pairwise([-math.inf, *levels])):
        raise OptionError(f"levels {list(levels)} do not ascend: give them from small to large")
    outside = [fraction for fraction in levels if not 0 < fraction < 1] if by == "fraction" else []
    if outside:
        raise OptionError(f"{outside[0]} is no fraction of a network's channels: give one between 0 and 1")


def _take_fraction(widths: Widths, names: Sequence[str], fraction: float, multiple: int) -> dict[str, int]:
    """Round a fraction of each width to the nearest multiple, but to one at least."""
    full = {name: widths[name].size for name in names}
    rounded = {name: round(size * fraction / multiple) * multiple for name, size in full.items()}
    return {name: min(max(size, multiple), full[name]) for name, size in rounded.items()}


def _fit_curves(
    curves: Curves,
    budgets: Sequence[float],
    measure: Callable[[Mapping[str, int]], float],
    by: str,
    multiple: int,
) -> list[dict[str, int]]:
    """Choose the sizes for each budget, those for a smaller one among those for the next."""
    fitted, sizes = [], {name: curve[0].channels for name, curve in curves.items()}
    for budget in reversed(budgets):
        sizes = fit_to_budget(curves, sizes, budget, measure, by, multiple)
        fitted.append(sizes)
    return fitted[::-1]


def _fit_budget(
    widths: Widths, names: Sequence[str], budget: float, multiple: int, measure: Measure, by: str
) -> dict[str, int]:
    """Bisect for the largest fraction of all widths, rounded down, that is within a budget."""
    full = tuple(widths[name].size for name in names)

    def take(fraction: float) -> tuple[int, ...]:
        sizes = (int(size * fraction) // multiple * multiple for size in full)
        return tuple(min(max(part, multiple), size) for part, size in zip(sizes, full, strict=True))

    if (minimum := measure(take(0.0))) > budget:
        raise StructureError(
            f"no level is within {by}={budget:g}: {minimum:g} is the least; ask for more, or lower the "
            "multiple"
        )
    if (maximum := measure(full)) <= budget:
        raise StructureError(
            f"the whole network takes {by}={maximum:g}: a level below it needs a smaller budget"
        )
    lower, upper = 0.0, 1.0
    if measure(take(upper)) <= budget:  # not the network, where the multiple does not divide a width
        lower = upper
    for _ in range(STEPS):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if measure(take(middle)) <= budget else (lower, middle)
    return dict(zip(names, take(lower), strict=True))
