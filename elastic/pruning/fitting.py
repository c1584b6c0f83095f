"""Gates closed as far as a budget asks for: how many weights stay is tried out, which ones a ranking says."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.measure import counts
from elastic.pruning import gates
from elastic.pruning.compaction import compact
from elastic.widths.parameters import get_weight

TOLERANCE = 0.02  # of a budget


@torch.no_grad()
def fit_gates_to_budget(
    model: nn.Module, asked: float, keep: Callable[[nn.Module, float], None], measure: Callable[[], float]
) -> None:
    """Keep as many weights as fit into `asked`, in place; where nothing fits, as few as `keep` can.

    What a gate frees elsewhere (a norm's gain, a bias, a whole channel) shows only when it is closed, so
    every try is measured. The size is nearly linear in the weights kept, so that regula falsi (Illinois:
    an end that stays counts half, Dowell & Jarratt 1971) needs a few tries where halving needs log2 of the
    number of weights.

    Args:
        asked: the largest size allowed, in units of `measure`.
        keep: closes and opens gates until about `count` weights (Σ price) stay, or one a layer where that is
            more: `gates.settle`, or `keep_largest`. It starts from the gates as `settle_on` found them.
        measure: the size with the gates as they are when it is called.
    """
    held = [(gate, gate.score.detach().clone()) for _, _, gate in gates.iterate_gates(model)]

    def leave(count: int) -> None:
        for gate, score in held:
            gate.score.data = score.clone()
        keep(model, count)

    def excess(count: int) -> float:
        leave(count)
        return measure() - asked

    fits, over = 0, int(gates.count_open(model)) + 1
    below, above = -float(asked), excess(over)
    if above <= 0:  # there is room: some may open again
        fits, over, below = over, int(gates.count_gated(model)) + 1, above
        above = excess(over)
    last = 0.0
    while over - fits > 1 and below < 0 < above:
        count = round(fits + (over - fits) * below / (below - above))
        count = min(max(count, fits + 1), over - 1)
        found = excess(count)
        if found <= 0:
            fits, below, above = count, found, above / (2 if last < 0 else 1)
        else:
            over, above, below = count, found, below / (2 if last > 0 else 1)
        last = found
    leave(over if above <= 0 else fits)
    for gate, score in held:  # in the memory format they had: a resumed run must not differ
        gate.score.data = score.copy_(gate.score)


def measure_compacted(model: nn.Module, example: Tensor, aim: str = "params", trained: bool = True) -> int:
    """Params, or MACs of weights that are not zero, of the network as compaction would leave it.

    Args:
        trained: what is exactly zero counts as zero. Else it counts by its gate: what reads a fresh channel
            is zero behind gates that have been shut ever since, but not once it is trained.
    """
    if not trained:
        model = copy.deepcopy(model)
        for name, parameter in model.named_parameters():
            if not name.endswith("score"):
                parameter.data[parameter == 0] = 1
    plain = compact(model, example)
    if aim == "params":
        return counts.count_params(plain)
    uses = counts.count_macs_per_weight(plain, example)
    kept = {path: int(get_weight(plain.get_submodule(path)).count_nonzero()) for path in uses}
    return round(sum(times * kept[path] for path, times in uses.items()))


def check_budget_reachable(model: nn.Module, example: Tensor, asked: int, aim: str = "params") -> None:
    """Gates never close the last weight of a layer, and do not reach norms and biases.

    Raises:
        StructureError: a budget that is less than what then stays.
    """
    least = copy.deepcopy(model)
    gates.keep_best_gates(least, 0)
    stays = measure_compacted(least, example, aim)
    if asked < stays:
        raise StructureError(
            f"a budget of {asked} {aim} cannot be reached: {stays} stay when every layer keeps one gate "
            "open; ask for more, or start from a smaller network"
        )


def report_budget(model: nn.Module, example: Tensor, asked: int, aim: str = "params") -> dict[str, Any]:
    """The budget asked for, what was got and, where that is off by more than 2 %, why."""
    got = measure_compacted(model, example, aim)
    report = {"budget/by": aim, "budget/target": asked, "budget/actual": got}
    if abs(got - asked) <= TOLERANCE * asked:
        return report
    held = [(gate.score > 0, get_weight(layer)) for _, layer, gate in gates.iterate_gates(model)]
    if got > asked and all(open_.sum() == 1 for open_, _ in held):
        why = "every layer keeps one gate open; ask for more"
    elif got > asked:
        why = "the network grew, or was not yet settled, when pruning came to its end"
    elif all(open_.all() for open_, _ in held):
        why = "all gates are open: the network is no larger"
    elif all(open_.shape == weight.shape for open_, weight in held):
        why = "the next weight brings back a channel"
    else:
        why = "one gate more would be over it"
    return report | {"budget/reason": why}


@torch.no_grad()
def keep_largest_weights(model: nn.Module, count: float) -> None:
    """Of the weights whose gates are open, keep the `count` of largest magnitude and close the others.

    Ranked over all layers at once; of every layer that has any, one stays. What is closed stays closed.
    There must be a gate for each weight; its score is then 1 or -1. (Zhu & Gupta, arXiv 1710.01878, rank
    within each layer.)
    """
    held = [(gate, gate.score > 0, get_weight(layer).abs()) for _, layer, gate in gates.iterate_gates(model)]
    for gate, open_, magnitude in held:
        gate.score.data = magnitude.where(open_, -gates.START)
    gates.keep_best_gates(model, count)
    for gate, open_, magnitude in held:
        stays = open_ & (gate.score > 0)  # of a layer that has none open, `settle` opens one
        gate.score.data = torch.where(stays, gates.START, -gates.START).to(magnitude)
