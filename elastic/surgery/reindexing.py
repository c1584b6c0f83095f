"""Change structure: every change is a re-indexing of widths, and `reindex` is the only way to make one.

New channel i is old channel index[i]; -1 is a fresh channel. Parameters (the same objects, so optimizer
groups, schedulers and other references hold), buffers, gate scores, optimizer state, averaged copies and
module attributes follow in one call. All new tensors are computed before the first one is put in place,
so a failure leaves everything as it was.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elastic.surgery.fresh import Fresh, zero_out
from elastic.surgery.gathering import (
    Move,
    fill_directions,
    gather_from_model,
    gather_with_fresh,
    restore_norms,
)
from elastic.surgery.graphs import refuse_live_graph
from elastic.surgery.indices import FRESH, Index, check_index, grow_index, resize_index, split_index
from elastic.surgery.layers import list_tensors, resize_attributes
from elastic.surgery.optimizer_state import gather_state
from elastic.widths.copying import copy_module
from elastic.widths.matching import require_widths
from elastic.widths.parameters import apply_constraints, recompute_weights
from elastic.widths.width import Slot, Widths

__all__ = ["FRESH", "Index", "grow_index", "reindex", "resize_index", "split_index"]

Layers = Mapping[str, nn.Module]  # by path


@dataclass
class Replacements:
    """Hold new tensors until all of them are there."""

    tensors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    states: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)

    def put_in_place(self) -> None:
        """Give every tensor its new value; gradients are dropped."""
        for tensor, value in self.tensors:
            tensor.data = value
            tensor.grad = None
        for state, key, value in self.states:
            state[key] = value


def reindex(
    model: nn.Module,
    widths: Widths,
    changes: Mapping[str, Index],
    *,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    fresh: Fresh = zero_out,
    generator: torch.Generator | None = None,
) -> None:
    """Re-index the channels of one or more widths, in place.

    Args:
        model: the model that `widths` was discovered on (gates may have been attached since).
        changes: for each width, the old channel (0 … size-1) that each new channel continues, or -1.
            A channel taken several times is split (Net2Net, arXiv 1511.05641): its readers share its weight.
        optimizers: their state of the changed parameters follows; their parameter groups do not change.
        copies: further models of the same structure (averaged weights); fresh entries are the model's.
        fresh: how the weights of fresh channels start, see `elastic.surgery.fresh`.
        generator: source of their randomness; give a seeded one where the result must repeat.

    Call it between training steps; gradients are dropped.

    Raises:
        StructureError: an unknown or fixed width, an index out of range or empty, an optimizer whose state
            cannot follow, an autograd graph still alive. Nothing has changed then.
    """
    require_widths(model, widths)
    generator = generator or torch.Generator().manual_seed(0)
    optimizers, copies = list(optimizers), list(copies)
    indices = {name: check_index(index, widths[name].size, name) for name, index in changes.items()}
    moves = _find_moves(widths, indices)
    layers, *others = (_find_layers(root, moves) for root in (model, *copies))
    affected = [layer for parts in (layers, *others) for layer in parts.values()]
    for layer in affected:
        recompute_weights(layer)  # which hold the last forward's graph
    refuse_live_graph(item.value for path, tensor in moves for item in list_tensors(layers[path], tensor))
    for layer in affected:
        apply_constraints(layer)
    replacements = _renew_tensors(layers, moves, optimizers, others, fresh, generator)
    replacements.put_in_place()
    for parts in (layers, *others):
        _resize_layers(parts, moves)
    for name, index in indices.items():
        widths[name].size = len(index)


def reindex_copy(model: nn.Module, widths: Widths, changes: Mapping[str, Index]) -> tuple[nn.Module, Widths]:
    """Copy a model and re-index the copy's channels, see `reindex`; return it with widths of its own."""
    replica, replica_widths = copy_module(model), copy.deepcopy(widths)
    reindex(replica, replica_widths, changes)
    return replica, replica_widths


def _find_moves(widths: Widths, indices: Mapping[str, Tensor]) -> dict[tuple[str, str], list[Move]]:
    """Find the new index of each dimension of every tensor that must follow."""
    slots = {(slot.module, slot.tensor, slot.dim): slot for name in indices for slot in widths[name].slots}
    positions: dict[int, Tensor] = {}  # by the identity of a layout, which many slots share
    moves: dict[tuple[str, str], list[Move]] = defaultdict(list)
    for slot in slots.values():
        if id(slot.layout) not in positions:
            positions[id(slot.layout)] = _index_positions(widths, slot, indices)
        moves[slot.module, slot.tensor].append(Move(slot, positions[id(slot.layout)]))
    return dict(moves)


def _find_layers(root: nn.Module, moves: Mapping[tuple[str, str], list[Move]]) -> Layers:
    """Find the layers that follow, by their paths; a layer that has several is listed by one only."""
    modules = dict(root.named_modules())
    return {path: modules.get(path) or root.get_submodule(path) for path, _ in moves}


def _index_positions(widths: Widths, slot: Slot, indices: Mapping[str, Tensor]) -> Tensor:
    """Turn the indices of widths into one of the positions along a slot's dimension, segment by segment."""
    parts, start = [], 0
    for segment, extent in zip(slot.layout, widths.extents(slot), strict=True):
        index = indices.get(segment.width) if segment.width is not None else None
        if index is None:
            parts.append(torch.arange(start, start + extent))
        else:  # a channel's copies lie side by side
            channels = index[:, None]
            positions = start + channels * segment.repeat + torch.arange(segment.repeat)
            parts.append(positions.where(channels >= 0, torch.tensor(FRESH)).flatten())
        start += extent
    return torch.cat(parts)


def _renew_tensors(
    layers: Layers,
    moves: Mapping[tuple[str, str], list[Move]],
    optimizers: list[torch.optim.Optimizer],
    copies: list[Layers],
    fresh: Fresh,
    generator: torch.Generator,
) -> Replacements:
    """Compute the new values of tensors, optimizer state and copies; nothing changes yet."""
    replacements = Replacements()
    for (path, tensor), tensor_moves in moves.items():
        items = list_tensors(layers[path], tensor)
        gathered = [gather_with_fresh(path, item, tensor_moves, fresh, generator) for item in items]
        gathered = fill_directions(items, gathered, generator)
        for item, value in zip(items, restore_norms(items, tensor_moves, gathered), strict=True):
            replacements.tensors.append((item.value, value))
            for optimizer in optimizers:
                replacements.states += gather_state(optimizer, item, tensor_moves, value)
        for replica in copies:
            own = list_tensors(replica[path], tensor)
            pairs = zip(own, gathered, strict=True)
            averaged = [gather_from_model(item, tensor_moves, value) for item, value in pairs]
            values = restore_norms(own, tensor_moves, averaged)
            replacements.tensors += [(item.value, value) for item, value in zip(own, values, strict=True)]
    return replacements


def _resize_layers(layers: Layers, moves: Mapping[tuple[str, str], list[Move]]) -> None:
    """Let layers' attributes say the new sizes of their tensors."""
    for move in (move for tensor_moves in moves.values() for move in tensor_moves):
        slot = move.slot
        is_depthwise = slot.role == "depthwise"
        resize_attributes(layers[slot.module], slot.tensor, slot.dim, len(move.index), is_depthwise)
    for layer in layers.values():
        recompute_weights(layer)
