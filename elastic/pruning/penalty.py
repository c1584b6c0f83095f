"""Add the penalty of open gates by its gradient (a stand-in)."""

from collections.abc import Iterable

import torch
from torch import nn

from elastic.pruning.gates import Gate
from elastic.widths.parameters import get_weight


@torch.no_grad()
def add_penalty_gradient(gates: Iterable[tuple[str, nn.Module, Gate]], penalty: float) -> None:
    """Add λ · d/ds Σ price · size · σ(s) to the gradients of scores."""
    for _, layer, gate in gates:
        worth = gate.price * get_weight(layer).numel() / gate.score.numel()
        sigma = torch.sigmoid(gate.score)
        grad = penalty * worth * sigma * (1 - sigma) * (gate.grace <= 0)
        if gate.score.requires_grad:
            gate.score.grad = grad if gate.score.grad is None else gate.score.grad + grad
