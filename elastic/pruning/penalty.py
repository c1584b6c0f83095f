"""Price gates, and add the penalty on open ones to their gradients, without autograd and fused."""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from elastic.errors import OptionError
from elastic.pruning.gates import Gate, average_blocks, compute_worth, iterate_gates


@torch.no_grad()
def add_penalty_gradient(gates: Iterable[tuple[str, nn.Module, Gate]], penalty: float) -> None:
    """Add to each score's gradient that of λ · Σ price · size · σ(score): λ · price · size · σ'(score).

    The sum is how many weights (at price 1) or MACs the gates mean to keep; `size` is the number of weights
    behind one score. Entries in their grace period get nothing, nor do scores without a gradient: those of
    layers that the step has not trained. There are as many calls for a hundred gates as for one, and a few
    more for each gate at block grain.

    Args:
        gates: as `iterate_gates` yields them.
        penalty: λ, times whatever the gradients are scaled by.
    """
    layers = [(layer, gate) for _, layer, gate in gates if gate.score.grad is not None]
    if not layers:
        return
    scores: list[Tensor] = [gate.score for _, gate in layers]
    gradients = list(torch._foreach_sigmoid(scores))
    complements = torch._foreach_mul(gradients, -1.0)
    torch._foreach_add_(complements, 1.0)
    torch._foreach_mul_(gradients, complements)  # σ' = σ · (1 − σ)
    # Grace counts epochs: 1 − min(grace, 1) is 1 where none is left, else 0.
    counts = torch._foreach_clamp_max([gate.grace for _, gate in layers], 1.0)
    torch._foreach_mul_(counts, -1.0)
    torch._foreach_add_(counts, 1.0)
    torch._foreach_mul_(gradients, counts)
    torch._foreach_mul_(gradients, [penalty * compute_worth(layer, gate) for layer, gate in layers])
    torch._foreach_add_([cast(Tensor, score.grad) for score in scores], gradients)
    for _, gate in layers:
        if gate.block is not None:  # of equal scores, σ of a tensor's last ones may differ by a bit
            gradient = cast(Tensor, gate.score.grad)
            gradient.copy_(average_blocks(gradient, gate.block, gate.channel))


def set_prices(model: nn.Module, uses: Mapping[str, float]) -> None:
    """Set what a weight behind each gate costs: its MACs, relative to those of a weight of the average layer.

    Args:
        uses: MACs of a weight, by layer, from `count_macs_per_weight`.

    Raises:
        OptionError: there are none.
    """
    if not uses:
        raise OptionError("no layer of the network has a weight whose MACs gates could save: set by=params")
    average = sum(uses.values()) / len(uses)
    for path, _, gate in iterate_gates(model):
        gate.price = uses.get(path, 0.0) / average  # an embedding multiplies nothing
