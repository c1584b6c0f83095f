"""Score how much each channel of a width matters: what is kept first, and which channels a small level has.

Every measure sums over all layers that write the width, shortcuts included; a channel of a residual trunk
is worth what all its writers put into it.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.errors import OptionError, StructureError
from elastic.levels.cutting import find_nestable, iterate_norms
from elastic.levels.nested import Levels
from elastic.pruning.gates import Gate
from elastic.widths.copying import copy_module
from elastic.widths.discovery import discover
from elastic.widths.hooks import quiet_hooks
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.mode import set_mode
from elastic.widths.parameters import get_original, get_weight, get_weight_name
from elastic.widths.width import Slot, Width, Widths

Importance = Literal["l2", "l1", "taylor", "norm", "gate"]
Batches = Iterable[tuple[Example, Tensor]]  # inputs, targets
Loss = Callable[[Any, Tensor], Tensor]

# From all entries of a channel that one layer has, (channels, entries), to a score, (channels,).
SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda entries: entries.square().sum(1),  # the root is taken of the sum over layers
    "l1": lambda entries: entries.abs().sum(1),
    "taylor": lambda entries: entries.sum(1).abs(),
    "norm": lambda entries: entries.abs().sum(1),
    "gate": lambda entries: entries.sum(1),
}


def score_channels(
    model: nn.Module,
    widths: Widths,
    importance: Importance = "l2",
    batches: Batches | None = None,
    loss: Loss = F.cross_entropy,
) -> dict[str, Tensor]:
    """Score each channel of each width: tensors of shape (channels,).

    Args:
        importance: `l2`, the Euclidean norm over all weights that write the channel (arXiv 2505.11569);
            `l1`, their absolute sum (Li et al., arXiv 1608.08710); `taylor`, the absolute sum over writers
            of Σ weight · gradient (Molchanov et al., arXiv 1906.10771, section 3.1); `norm`, the sum of the
            absolute gains of its norms (Liu et al., arXiv 1708.06519); `gate`, the sum of σ(score) over the
            gates of the weights that write it.
        batches: for `taylor`, from the training data.
        loss: for `taylor`, of outputs and targets.

    Raises:
        OptionError: there is no such measure, or `taylor` has no batches.
        StructureError: the model has nothing to be measured so.
    """
    if importance not in get_args(Importance):
        raise OptionError(f"there is no importance '{importance}': choose {', '.join(get_args(Importance))}")
    values = _find_values(model, importance, batches, loss)
    return {
        name: _score_width(model, widths, width, importance, values).cpu() for name, width in widths.items()
    }


def rank_channels(scores: Tensor, size: int | None = None) -> Tensor:
    """Find the index that puts channels in order, the best one in front; equals keep their order.

    Args:
        scores: (channels,).
        size: of the whole width; channels without a score stay where they are.
    """
    best = scores.sort(descending=True, stable=True).indices
    return torch.cat([best, torch.arange(len(scores), size or len(scores))])


def find_order(
    levels: Levels,
    k: int,
    example: Example,
    importance: Importance,
    batches: Batches | None,
    loss: Loss,
) -> dict[str, Tensor]:
    """Find the index of each width that levels have parts of, which puts what matters most to level k first.

    Args:
        example: an input of the network, or several.
        importance, batches, loss: see `score_channels`.
    """
    widths, sizes = discover(levels[k], *list_inputs(example)), levels.widths.sizes()
    scores = score_channels(levels[k], widths, importance, batches, loss)
    return {
        name: rank_channels(scores[name], sizes[name])
        for name in find_nestable(levels.widths)
        if name in scores and len(scores[name]) == levels.sizes[k][name]  # groups of one channel are others
    }


Values = Callable[[str], Tensor]  # what counts of a layer, by its path; of its weight's shape


def _find_values(model: nn.Module, importance: Importance, batches: Batches | None, loss: Loss) -> Values:
    if importance == "taylor":
        return partial(_get_product, _measure_gradients(model, batches, loss))
    if importance == "gate":
        return lambda path: _get_gates(model.get_submodule(path), path)
    return lambda path: get_weight(model.get_submodule(path))


@torch.no_grad()
def _score_width(
    model: nn.Module, widths: Widths, width: Width, importance: Importance, values: Values
) -> Tensor:
    slots = _find_norms(model, width) if importance == "norm" else width.slots_with("out")
    score = torch.zeros(width.size)
    for slot in slots:
        rows = values(slot.module).float().cpu().transpose(0, slot.dim)
        positions = widths.positions(slot, width.name)
        entries = rows.reshape(len(rows), -1)[positions]  # (channels, copies, entries)
        score += SUMS[importance](entries.flatten(1))
    return score.sqrt() if importance == "l2" else score


def _find_norms(model: nn.Module, width: Width) -> list[Slot]:
    """Find the gains of norms on a width."""
    norms = dict(iterate_norms(model))
    slots = [slot for slot in width.slots if slot.tensor == "weight" and slot.module in norms]
    if not slots:
        raise StructureError(f"no norm lies on width '{width.name}': choose another importance than 'norm'")
    return slots


def _get_gates(layer: nn.Module, path: str) -> Tensor:
    gate = next((module for module in layer.modules() if isinstance(module, Gate)), None)
    if gate is None:
        raise StructureError(f"{path} has no gates: choose another importance than 'gate'")
    return torch.sigmoid(gate.score)


def _get_product(products: dict[str, Tensor], path: str) -> Tensor:
    if path not in products:
        raise StructureError(f"{path} gets no gradient: choose another importance than 'taylor'")
    return products[path]


def _measure_gradients(model: nn.Module, batches: Batches | None, loss: Loss) -> dict[str, Tensor]:
    """Measure weight times gradient of the mean loss, of each layer with a weight."""
    # A level's tensors are views that need no gradient.
    replica = set_mode(copy_module(model)).requires_grad_()
    with quiet_hooks(replica):
        for x, y_B in batches or ():
            torch.autograd.backward(loss(replica(*list_inputs(x)), y_B))
    layers = dict(replica.named_modules())
    weights = {path: get_original(layer, get_weight_name(layer)) for path, layer in layers.items()}
    products = {
        path: weight.detach() * weight.grad
        for path, weight in weights.items()
        if isinstance(weight, Tensor) and weight.is_leaf and weight.grad is not None
    }
    if not products:
        raise OptionError("importance 'taylor' needs batches of the training data: give some")
    return products
