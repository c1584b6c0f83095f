"""How much each channel of a width matters: what is kept first, and which channels a small level has.

Every measure sums over all layers that write the width, shortcuts included; a channel of a residual trunk
is worth what all its writers put into it.
"""

import copy
from collections.abc import Iterable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.pruning.gates import Gate
from elastic.surgery.layers import NORMS
from elastic.widths.discovery import Width, Widths
from elastic.widths.parameters import get_original, get_weight

Importance = Literal["l2", "l1", "taylor", "norm", "gate"]
Batches = Iterable[tuple[Tensor, Tensor]]  # x_BCHW, y_B


def score_channels(
    model: nn.Module, widths: Widths, how: Importance = "l2", batches: Batches | None = None
) -> dict[str, Tensor]:
    """A score for each channel of each width, of shape (channels,).

    Args:
        how: `l2`, the Euclidean norm over all weights that write the channel (arXiv 2505.11569);
            `l1`, their absolute sum (Li et al., arXiv 1608.08710); `taylor`, the absolute sum over writers
            of Σ weight · gradient (Molchanov et al., arXiv 1906.10771, section 3.1); `norm`, the sum of the
            absolute gains of its norms (Liu et al., arXiv 1708.06519); `gate`, the sum of σ(score) over the
            gates of the weights that write it.
        batches: for `taylor`, from the training data.

    Raises:
        StructureError: a measure that there is none of, or that the model has nothing for.
    """
    if how not in get_args(Importance):
        raise StructureError(f"there is no importance '{how}': choose {', '.join(get_args(Importance))}")
    values = _gradients(model, batches) if how == "taylor" else {}
    return {name: _score(model, widths, width, how, values).cpu() for name, width in widths.items()}


def rank_channels(scores: Tensor, size: int | None = None) -> Tensor:
    """The index that puts channels in order, the best one in front; equals keep their order.

    Args:
        scores: (channels,).
        size: of the whole width; channels without a score stay where they are.
    """
    best = scores.sort(descending=True, stable=True).indices
    return torch.cat([best, torch.arange(len(scores), size or len(scores))])


@torch.no_grad()
def _score(
    model: nn.Module, widths: Widths, width: Width, how: Importance, values: dict[str, Tensor]
) -> Tensor:
    total = torch.zeros(width.size)
    slots = [s for s in width.slots if isinstance(model.get_submodule(s.module), NORMS)]
    slots = [s for s in slots if s.tensor == "weight"] if how == "norm" else width.slots_with("out")
    for slot in slots:
        layer = model.get_submodule(slot.module)
        value = _value(layer, slot.module, how, values)
        rows = value.float().cpu().transpose(0, slot.dim)
        each = rows.reshape(len(rows), -1)[widths.positions(slot, width.name)]  # (channels, copies, entries)
        total += _summed(each.flatten(1), how)
    if not slots:
        raise StructureError(f"no norm lies on width '{width.name}': choose another importance than 'norm'")
    return total.sqrt() if how == "l2" else total


def _value(layer: nn.Module, path: str, how: Importance, values: dict[str, Tensor]) -> Tensor:
    if how == "taylor":
        return values[path]
    if how != "gate":
        return get_weight(layer)
    gate = next((m for m in layer.modules() if isinstance(m, Gate)), None)
    if gate is None:
        raise StructureError(f"{path} has no gates: choose another importance than 'gate'")
    return torch.sigmoid(gate.score)


def _summed(entries: Tensor, how: Importance) -> Tensor:
    """(channels, entries) -> (channels,)."""
    if how == "l2":
        return entries.square().sum(1)
    return entries.sum(1).abs() if how == "taylor" else entries.abs().sum(1)


def _gradients(model: nn.Module, batches: Batches | None) -> dict[str, Tensor]:
    """Weight times gradient of the mean cross entropy, of each layer with a weight."""
    twin = copy.deepcopy(model).eval().requires_grad_()  # a level's tensors are views that need no gradient
    for x_BCHW, y_B in batches or ():
        F.cross_entropy(twin(x_BCHW), y_B).backward()  # type: ignore[no-untyped-call]
    weights = {path: get_original(layer, "weight") for path, layer in twin.named_modules()}
    found = {path: w.detach() * w.grad for path, w in weights.items() if w is not None and w.grad is not None}
    if not found:
        raise StructureError("importance 'taylor' needs batches of the training data")
    return found
