"""Structural change: every one is a re-indexing of widths, and `reindex` is the only way to make one.

New channel i is old channel index[i]; -1 is a fresh channel. Parameters (the same objects, so optimizer
groups, schedulers and other references hold), buffers, gate scores, optimizer state, averaged copies and
module attributes follow in one call. All new tensors are computed before the first one is put in place,
so a failure leaves everything as it was.
"""

import gc
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.surgery.fresh import Fresh, Patch, zero_out
from elastic.surgery.layers import LayerTensor, list_tensors, resize_attributes
from elastic.widths.discovery import Slot, Widths

FRESH = -1
# Optimizer state that holds second moments: a zero there makes a fresh channel's first step many times
# the learning rate, so fresh entries take the mean along the axis.
SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"}

Index = Sequence[int] | Tensor


@dataclass(frozen=True)
class Move:
    """How one tensor dimension is re-indexed: the old position of each new one, -1 where it is fresh."""

    slot: Slot
    index: Tensor


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
        fresh: how the weights of fresh channels start, see `elastic.fresh`.
        generator: source of their randomness; give a seeded one where the result must repeat.

    Call it between training steps; gradients are dropped.

    Raises:
        StructureError: an unknown or fixed width, an index out of range or empty, an optimizer whose state
            cannot follow, an autograd graph still alive. Nothing has changed then.
    """
    wanted = {name: _checked(index, widths[name].size, name) for name, index in changes.items()}
    generator = generator or torch.Generator().manual_seed(0)
    optimizers, copies = list(optimizers), list(copies)
    moves = _moves(widths, wanted)
    touched = [list_tensors(model.get_submodule(path), tensor) for path, tensor in moves]
    _refuse_live_graph(item.value for items in touched for item in items)
    replaced: list[tuple[Tensor, Tensor]] = []
    states: list[tuple[dict[str, Tensor], str, Tensor]] = []

    for (path, tensor), along in moves.items():
        for i, item in enumerate(list_tensors(model.get_submodule(path), tensor)):
            new = _renew(path, item, along, fresh, generator)
            replaced.append((item.value, new))
            for optimizer in optimizers:
                states += _renew_state(optimizer, item, along)
            for twin in copies:
                its = list_tensors(twin.get_submodule(path), tensor)[i]
                kept = _gather(its, along, share=True)
                replaced.append((its.value, _fresh_from(new, kept, its, along)))

    for old, new in replaced:
        old.data = new
        old.grad = None
    for state, key, new in states:
        state[key] = new
    for move in (move for along in moves.values() for move in along):
        slot = move.slot
        for root in (model, *copies):
            layer = root.get_submodule(slot.module)
            resize_attributes(layer, slot.tensor, slot.dim, len(move.index), slot.role == "depthwise")
    for name, index in wanted.items():
        widths[name].size = len(index)


def _refuse_live_graph(parameters: Iterable[Tensor]) -> None:
    """A graph that is still alive expects the parameters as they are: its next backward would be wrong."""
    held = [p for p in parameters if p.requires_grad]
    if any(map(_graph_alive, held)):
        gc.collect()  # it may hang on a reference cycle only
        if any(map(_graph_alive, held)):
            raise StructureError(
                "an autograd graph of this model is alive: drop its outputs and losses first"
            )


def _graph_alive(parameter: Tensor) -> bool:
    """A parameter has one gradient accumulator, which remembers the shape it was made for while it lives."""
    value = parameter.data
    parameter.data = value.new_empty(0)
    with torch.enable_grad():
        accumulator: Any = parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    parameter.data = value
    return tuple(accumulator._input_metadata[0].shape) != (0,)


def grow_index(size: int, by: int) -> Tensor:
    """Keep all channels and add `by` fresh ones."""
    return torch.cat([torch.arange(size), torch.full((by,), FRESH)])


def split_index(size: int, by: int, generator: torch.Generator) -> Tensor:
    """Keep all channels and let `by` of them, chosen at random, stand twice (or more where by > size)."""
    chosen = [torch.randperm(size, generator=generator) for _ in range(-(-by // size))]
    return torch.cat([torch.arange(size), torch.cat(chosen)[:by]])


def resize_index(size: int, to: int) -> Tensor:
    """The first `to` channels, fresh ones past the last: gives shapes to be loaded into."""
    return torch.arange(to).where(torch.arange(to) < size, torch.tensor(FRESH))


def _checked(index: Index, size: int, name: str) -> Tensor:
    found = torch.as_tensor(index).cpu()
    if found.numel() and (found.is_floating_point() or found.dtype == torch.bool):
        raise StructureError(f"width '{name}' is indexed by channel numbers, not by {found.dtype} values")
    if found.dim() != 1 or len(found) == 0:
        raise StructureError(f"width '{name}' needs at least one channel; the index given leaves none")
    found = found.long()
    if found.min() < FRESH or found.max() >= size:
        asked = f"{int(found.min())} … {int(found.max())}"
        raise StructureError(f"width '{name}' has channels 0 … {size - 1}; the index asks for {asked}")
    return found


def _moves(widths: Widths, wanted: Mapping[str, Tensor]) -> dict[tuple[str, str], list[Move]]:
    """For every tensor that must follow, the new index of each of its dimensions."""
    moves: dict[tuple[str, str], list[Move]] = defaultdict(list)
    for slot in dict.fromkeys(slot for name in wanted for slot in widths[name].slots):
        index, start = [], 0
        for segment, extent in zip(slot.layout, widths.extents(slot), strict=True):
            if segment.width is not None and segment.width in wanted:
                units = wanted[segment.width][:, None]
                places = start + units * segment.repeat + torch.arange(segment.repeat)
                index.append(places.where(units >= 0, torch.tensor(FRESH)).flatten())
            else:
                index.append(torch.arange(start, start + extent))
            start += extent
        moves[slot.module, slot.tensor].append(Move(slot, torch.cat(index)))
    return dict(moves)


def _renew(
    layer: str, item: LayerTensor, moves: Sequence[Move], fresh: Fresh, generator: torch.Generator
) -> Tensor:
    """The re-indexed value, its fresh entries filled in."""
    new = _gather(item, moves, share=True)
    if not item.has_fresh_strategy:
        return new
    index = [torch.arange(n) for n in new.shape[:2]]
    for move in moves:
        index[move.slot.dim] = move.index
    places = [i.to(new.device) for i in index]
    patch = Patch(layer, new, places[0] < 0, places[1] < 0, places[1])
    return _laid_out(fresh(patch, generator), item.value)


def _gather(item: LayerTensor, moves: Sequence[Move], share: bool = False) -> Tensor:
    """Re-index the dimensions that the stored tensor has; a split channel's readers share its weight."""
    new = item.value.detach()
    for move in (move for move in moves if move.slot.dim in item.dims):
        dim, index = move.slot.dim, move.index.to(new.device)
        shape = [-1 if d == dim else 1 for d in range(new.dim())]
        filler = new.mean(dim, keepdim=True) if item.fill is None else new.new_tensor(item.fill)
        new = new.index_select(dim, index.clamp(min=0))
        if share and item.has_fresh_strategy and move.slot.role == "in":
            times = torch.bincount(index[index >= 0], minlength=1)[index.clamp(min=0)]
            new = new / times.clamp(min=1).view(shape)
        new = new.where((index >= 0).view(shape), filler)
    return _laid_out(new, item.value)


def _fresh_from(new: Tensor, kept: Tensor, item: LayerTensor, moves: Sequence[Move]) -> Tensor:
    """`kept`, with the entries of fresh channels taken from `new`."""
    for move in (move for move in moves if move.slot.dim in item.dims):
        shape = [-1 if d == move.slot.dim else 1 for d in range(kept.dim())]
        kept = kept.where((move.index >= 0).to(kept.device).view(shape), new.to(kept))
    return _laid_out(kept, item.value)


def _renew_state(
    optimizer: torch.optim.Optimizer, item: LayerTensor, moves: Sequence[Move]
) -> list[tuple[dict[str, Tensor], str, Tensor]]:
    state = optimizer.state.get(item.value, {})
    renewed = []
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if value.shape != item.value.shape:
            raise StructureError(
                f"{type(optimizer).__name__} keeps '{key}' of shape {tuple(value.shape)} for a tensor of "
                f"shape {tuple(item.value.shape)}, which cannot follow: use SGD, Adam or AdamW"
            )
        fill = None if key in SECOND_MOMENTS else 0.0
        renewed.append((state, key, _gather(LayerTensor(value, item.dims, fill), moves)))
    return renewed


def _laid_out(new: Tensor, old: Tensor) -> Tensor:
    """Keep the memory format: runs must not depend on when a tensor was last rebuilt."""
    last = old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last)
    return new.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
