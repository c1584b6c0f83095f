"""Gather the entries of a tensor anew along the dimensions that a width's channels lie on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastic.surgery.fresh import Fresh, Patch, draw_he_normal
from elastic.surgery.layers import LayerTensor
from elastic.widths.parameters import WEIGHT
from elastic.widths.width import Slot

ROUNDINGS = 16  # a norm is computed to within so many units in the last place


@dataclass(frozen=True)
class Move:
    """Say how one tensor dimension is re-indexed: the old position of each new one, -1 where it is fresh."""

    slot: Slot
    index: Tensor


def gather_with_fresh(
    layer: str, item: LayerTensor, moves: Sequence[Move], fresh: Fresh, generator: torch.Generator
) -> Tensor:
    """Re-index a layer's tensor; a strategy fills the fresh entries of a weight."""
    if item.has_fresh_strategy and _is_carried(item, moves):
        item = replace(item, fill=None, has_fresh_strategy=False)
    value = gather(item, moves)
    if not item.has_fresh_strategy:
        return value
    index = [torch.arange(n, device=value.device) for n in value.shape]
    for move in moves:
        index[move.slot.dim] = move.index.to(value.device)
    is_transposed = any(move.slot.is_transposed for move in moves)
    rows, columns = reversed(index[:2]) if is_transposed else index[:2]
    weight = value.transpose(0, 1) if is_transposed else value
    patch = Patch(layer, weight, rows < 0, columns < 0, columns)
    weight = fresh(patch, generator)
    weight = _scale_fresh_rows(weight, patch) if item.has_one_scale else weight
    return keep_memory_format(weight.transpose(0, 1) if is_transposed else weight, item.value)


def _scale_fresh_rows(weight: Tensor, patch: Patch) -> Tensor:
    """Let fresh rows be as long as the others are on average."""
    if not patch.fresh_out.any() or patch.fresh_out.all():
        return weight
    lengths = weight.flatten(1).norm(dim=1)
    scale = lengths[~patch.fresh_out].mean() / lengths[patch.fresh_out].mean()
    return torch.where(patch.rows, weight * scale, weight)


def _is_carried(item: LayerTensor, moves: Sequence[Move]) -> bool:
    """Tell whether a tensor is no layer's weight: one scalar a channel, or of a name that says nothing."""
    if any(move.slot.role != "per_channel" for move in moves):
        return False
    is_scalar = len(moves) == 1 and item.value.shape[moves[0].slot.dim] == item.value.numel()
    return is_scalar or any(move.slot.tensor != WEIGHT for move in moves)


def gather(item: LayerTensor, moves: Sequence[Move]) -> Tensor:
    """Re-index the dimensions on which a tensor has an entry a channel.

    The readers of a channel that is taken several times share its weight. In place of weight norm's norms
    their ratios to those of the direction are gathered, see `restore_norms`.
    """
    value = item.value.detach() if item.norm is None else item.norm.compute_scale().detach()
    value = value if item.shape is None else value.view(item.shape)
    for move in _select(item, moves):
        dim, index = move.slot.dim, move.index.to(value.device)
        shape = [-1 if d == dim else 1 for d in range(value.dim())]
        is_old = index >= 0
        has_fresh = not bool(is_old.all())
        fill = value.new_tensor(0.0 if item.fill is None else item.fill)
        if item.fill is None and has_fresh:
            fill = value.mean(dim, keepdim=True) if value.is_floating_point() else value.narrow(dim, 0, 1)
        value = value.index_select(dim, index.clamp(min=0))
        if item.has_fresh_strategy and move.slot.role == "in":
            copies = torch.bincount(index[is_old], minlength=1)
            if copies.max() > 1:
                value = value / copies[index.clamp(min=0)].clamp(min=1).view(shape)
        if has_fresh:
            value = value.where(is_old.view(shape), fill)
    return keep_memory_format(value if item.shape is None else value.flatten(), item.value)


def gather_from_model(item: LayerTensor, moves: Sequence[Move], renewed: Tensor) -> Tensor:
    """Re-index a copy's tensor; the entries of fresh channels are those of the model's, renewed already."""
    value = gather(item, moves)
    if item.shape is not None:
        return value
    for move in _select(item, moves):
        shape = [-1 if d == move.slot.dim else 1 for d in range(value.dim())]
        value = value.where((move.index >= 0).to(value.device).view(shape), renewed.to(value))
    return keep_memory_format(value, item.value)


def fill_directions(
    items: Sequence[LayerTensor], values: Sequence[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Draw a direction where none has been gathered, as of what reads by zeros, and let its ratio be zero."""
    values = list(values)
    for i, item in enumerate(items):
        if item.norm is not None and (is_empty := item.norm.compute_norms(values[0]) == 0).any():
            values[0] = torch.where(is_empty, draw_he_normal(values[0], generator), values[0])
            values[i] = values[i].masked_fill(is_empty, 0)
    return values


def restore_norms(
    items: Sequence[LayerTensor], moves: Sequence[Move], values: Sequence[Tensor]
) -> list[Tensor]:
    """Turn gathered ratios into norms of the direction, the first of the values: weights stay.

    Norms that differ from before by rounding alone are as before.
    """
    values = list(values)
    for i, item in enumerate(items):
        if item.norm is not None:
            values[i] = values[i] * item.norm.compute_norms(values[0])
            before = gather(replace(item, norm=None), moves)
            rounding = ROUNDINGS * torch.finfo(before.dtype).eps
            values[i] = torch.where(torch.isclose(values[i], before, rounding, 0), before, values[i])
    return values


def keep_memory_format(value: Tensor, old: Tensor) -> Tensor:
    """Lay a tensor out as another: runs must not depend on when a tensor was last rebuilt."""
    last = old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last)
    return value.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _select(item: LayerTensor, moves: Sequence[Move]) -> Iterator[Move]:
    return (move for move in moves if move.slot.dim in item.dims)
