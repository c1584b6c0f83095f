"""The penalty as a sum that autograd follows: what the library's own gradient of it is compared with."""

import torch
from torch import Tensor, nn

from elastic.pruning.gates import compute_worth, iterate_gates


def compute_penalty(model: nn.Module) -> Tensor:
    """Sum price · size · σ(score): how many weights (at price 1) or MACs the gates mean to keep.

    `size` is the number of weights behind one score. Entries in their grace period do not count.
    """
    terms = []
    for _, layer, gate in iterate_gates(model):
        openness = torch.sigmoid(gate.score) * (gate.grace <= 0)
        terms.append(compute_worth(layer, gate) * openness.sum())
    return torch.stack(terms).sum()
