"""Close gates as far as a budget asks for: how many weights stay is tried out, which ones a ranking says."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elastic.errors import OptionError
from elastic.measure.counts import count_macs_per_weight, count_params
from elastic.pruning.compaction import compact
from elastic.pruning.gates import (
    START,
    Gate,
    count_gated,
    count_open,
    count_open_gates,
    find_grain,
    iterate_gates,
    set_score,
)
from elastic.pruning.ranking import keep_best_gates
from elastic.widths.copying import copy_module
from elastic.widths.inputs import Example
from elastic.widths.parameters import compute_weight, get_weight

TOLERANCE = 0.02  # of a budget


@torch.no_grad()
def fit_gates_to_budget(
    model: nn.Module, target: float, keep: Callable[[nn.Module, float], None], measure: Callable[[], float]
) -> None:
    """Keep as many weights as fit into a budget, in place; where nothing fits, as few as `keep` can.

    What a gate frees elsewhere (a norm's gain, a bias, a whole channel) shows only when it is closed, so
    every count is tried and measured.

    Args:
        target: the largest size allowed, in units of `measure`.
        keep: closes and opens gates until about `count` weights (Σ price) stay, or one a layer where that is
            more: `keep_best_gates`, or `keep_largest_weights`. It always starts from the gates as they were.
        measure: the size with the gates as they are when it is called.
    """
    scores = [(gate, gate.score.clone()) for _, _, gate in iterate_gates(model)]

    def keep_anew(count: int) -> None:
        for gate, score in scores:
            set_score(gate, score)
        keep(model, count)

    def measure_excess(count: int) -> float:
        keep_anew(count)
        return measure() - target

    open_now, gated = int(count_open(model)) + 1, int(count_gated(model)) + 1
    excess = measure_excess(open_now)
    if excess > 0:
        count = search_count(measure_excess, 0, -float(target), open_now, excess)
    else:  # there is room: some may open again
        count = search_count(measure_excess, open_now, excess, gated, measure_excess(gated))
    keep_anew(count)


def search_count(
    measure_excess: Callable[[int], float], lower: int, lower_excess: float, upper: int, upper_excess: float
) -> int:
    """Find the largest count without excess between `lower`, which has none, and `upper`.

    The size is nearly linear in the weights kept, so that regula falsi needs a few tries where halving needs
    log2 of the number of weights. An end that stays twice counts half the second time (Illinois, Dowell &
    Jarratt 1971), or the search would creep towards it.
    """
    if upper_excess <= 0:
        return upper
    last_excess = 0.0
    while upper - lower > 1 and lower_excess < 0:
        # Where the line through both ends meets zero, but inside of them.
        count = round(lower + (upper - lower) * lower_excess / (lower_excess - upper_excess))
        count = min(max(count, lower + 1), upper - 1)
        excess = measure_excess(count)
        if excess <= 0:
            lower, lower_excess = count, excess
            upper_excess /= 2 if last_excess < 0 else 1
        else:
            upper, upper_excess = count, excess
            lower_excess /= 2 if last_excess > 0 else 1
        last_excess = excess
    return lower


def measure_compacted(
    model: nn.Module, example: Example, by: str = "params", count_zeros: bool = False
) -> int:
    """Measure the network as compaction would leave it: params, or MACs.

    At channel grain they are the MACs that dense kernels execute; at finer grains those of weights that are
    not zero, of which dense kernels do more.

    Args:
        count_zeros: what is exactly zero counts by its gate. What reads a fresh channel is zero behind gates
            that have been shut ever since, but not once it is trained.
    """
    if count_zeros:
        model = copy_module(model)
        scores = {id(gate.score) for _, _, gate in iterate_gates(model)}
        for parameter in model.parameters():
            if id(parameter) not in scores:
                parameter.data[parameter == 0] = 1
    plain = compact(model, example)
    if by == "params":
        return count_params(plain)
    uses = count_macs_per_weight(plain, example)
    weights = {path: get_weight(plain.get_submodule(path)) for path in uses}
    if find_grain(model) == "channel":
        return round(sum(use * weights[path].numel() for path, use in uses.items()))
    return round(sum(use * int(weights[path].count_nonzero()) for path, use in uses.items()))


def check_budget_reachable(model: nn.Module, example: Example, target: int, by: str = "params") -> None:
    """Refuse a budget of less than gates leave: they never close the last weight of a layer, nor a norm.

    Raises:
        OptionError: a budget that cannot be reached; says what stays.
    """
    smallest = copy_module(model)
    keep_best_gates(smallest, 0)
    size = measure_compacted(smallest, example, by)
    if target < size:
        raise OptionError(
            f"a budget of {target} {by} cannot be reached: {size} stay when every layer keeps one gate "
            "open; ask for more, or start from a smaller network"
        )


def report_budget(model: nn.Module, example: Example, target: int, by: str = "params") -> dict[str, Any]:
    """Report the budget, the actual size and, where that is off by more than 2 %, the reason."""
    actual = measure_compacted(model, example, by)
    report = {"budget/by": by, "budget/target": target, "budget/actual": actual}
    if abs(actual - target) > TOLERANCE * target:
        report["budget/reason"] = explain_miss(model, is_over=actual > target)
    return report


def explain_miss(model: nn.Module, is_over: bool) -> str:
    """Say why gates have missed their budget."""
    layers = [(gate.score, get_weight(layer)) for _, layer, gate in iterate_gates(model)]
    counts = count_open_gates(model)
    if is_over and all(count == 1 for count in counts):
        return "every layer keeps one gate open; ask for more"
    if is_over:
        return "the network grew, or its gates were not yet fitted, when pruning came to its end"
    if all(count == score.numel() for count, (score, _) in zip(counts, layers, strict=True)):
        return "all gates that are left are open: what has been pruned does not come back"
    if all(score.shape == weight.shape for score, weight in layers):
        return "the next weight brings back a channel"
    return "one gate more would be over it"


@torch.no_grad()
def keep_largest_weights(model: nn.Module, count: float) -> None:
    """Keep the `count` largest of the weights whose gates are open, and close the others.

    Ranked over all layers at once; of every layer that has any, one stays. What is closed stays closed.
    There must be a gate for each weight; its score is then 1 or -1. (Zhu & Gupta, arXiv 1710.01878, rank
    within each layer.)
    """
    was_open: dict[Gate, Tensor] = {}
    for _, layer, gate in iterate_gates(model):
        was_open[gate] = gate.score > 0
        set_score(gate, compute_weight(layer).abs().where(was_open[gate], -START))
    keep_best_gates(model, count)
    for gate, mask in was_open.items():
        stays = mask & (gate.score > 0)  # of a layer that has none open, the ranking opens one
        set_score(gate, torch.where(stays, START, -START))
