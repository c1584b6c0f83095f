"""Cut levels out of a network: its modules anew, around the first channels of each width in its tensors."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.surgery.layers import NORMS, resize_attributes
from elastic.widths.copying import copy_module
from elastic.widths.operations.interface import is_stored
from elastic.widths.width import Slot, Widths

Sizes = Mapping[str, int]
Part = tuple[
    slice | Tensor, ...
]  # of a tensor, along its first dimensions: from the first entry, or which ones
TensorParts = dict[tuple[str, str], Part]  # (layer, tensor) -> the part that a level has


def find_nestable(widths: Widths) -> list[str]:
    """Find the widths that a level can have a part of.

    Of weights that the forward itself changes there are no parts: it may assign others. Part of a weight that
    weight norm computes would have another norm.
    """
    whole = _find_whole(widths)
    return [name for name in widths if name not in whole]


def _find_whole(widths: Widths) -> dict[str, str]:
    """Find the widths of weights that have no parts, with reasons."""
    reasons = dict.fromkeys(
        widths.computed, "of weights that a norm or a constraint computes (remove it first)"
    )
    reasons |= dict.fromkeys(widths.written, "of weights that the forward changes")
    slots = [slot for width in widths.values() for slot in width.slots if slot.module in reasons]
    named = [(slot, segment.width) for slot in slots for segment in slot.layout]
    return {width: reasons[slot.module] for slot, width in named if width is not None}


def check_sizes(widths: Widths, sizes: Sequence[Sizes]) -> None:
    """Refuse levels that are not each a part of the next.

    Args:
        sizes: of every width, for each level and for the network, smallest first.

    Raises:
        StructureError: they are not, or a width cannot be cut; it says which and what to do.
    """
    for name in (name for level in sizes for name in level):
        widths[name]  # or it says why that width cannot change
    for k, (small, large) in enumerate(pairwise(sizes)):
        for name in small:
            _check_width(widths, name, k, small[name], large[name])
        if small == large:
            raise StructureError(f"levels {k} and {k + 1} are the same: {_suggest_change(widths, small)}")


def _check_width(widths: Widths, name: str, k: int, size: int, larger: int) -> None:
    if size < 1:
        raise StructureError(f"level {k} leaves width '{name}' without a channel: ask for more of it")
    if size > larger:
        raise StructureError(
            f"level {k} has {size} channels of '{name}', level {k + 1} has {larger}: "
            "give levels from small to large"
        )
    if size != widths[name].size and name not in find_nestable(widths):
        reason = _find_whole(widths)[name]
        raise StructureError(
            f"width '{name}' is {reason}, so that no level can have a part of it: leave it whole"
        )


def _suggest_change(widths: Widths, sizes: Sizes) -> str:
    """Say what keeps two levels from being different."""
    names = find_nestable(widths)
    if not names:
        return explain_no_room(widths)
    widest = max(names, key=lambda name: widths[name].size)
    size = sizes[widest]
    return f"the widest, '{widest}', has {size} channels in both; ask for larger steps between them"


def explain_no_room(widths: Widths) -> str:
    """Say why no width of a network leaves room for a level."""
    if not widths:
        return "no width of this network can change, which leaves no room for a level"
    reason = " or ".join(dict.fromkeys(_find_whole(widths).values()))
    return f"all widths ({', '.join(widths)}) are {reason}, which leaves no room for a level"


def cut_tensors(widths: Widths, sizes: Sizes, whole: Sizes | None = None) -> TensorParts:
    """Find what a level has of each tensor: the first channels of each width along every dimension.

    Where these lie side by side its part is a view. Where a concatenation, a split or groups put them between
    others' it is a copy.

    Args:
        whole: the sizes of the larger level that it is cut from; by default those of the network.
    """
    kept: dict[tuple[str, str], dict[int, slice | Tensor]] = {}
    for slot in _list_slots(widths):
        if is_stored(slot.tensor):
            kept.setdefault((slot.module, slot.tensor), {})[slot.dim] = _find_kept(widths, slot, sizes, whole)
    return {
        key: tuple(by_dim.get(d, slice(None)) for d in range(1 + max(by_dim))) for key, by_dim in kept.items()
    }


def _find_kept(widths: Widths, slot: Slot, sizes: Sizes, whole: Sizes | None) -> slice | Tensor:
    """Find the positions of a slot that a level has: up to one of them, or which ones."""
    extents = zip(widths.extents(slot, whole), widths.extents(slot, sizes), strict=True)
    parts = [torch.arange(extent) < kept for extent, kept in extents]
    positions = torch.cat(parts).nonzero().flatten()
    is_first = len(positions) == int(positions[-1]) + 1
    return slice(len(positions)) if is_first else positions


def is_view(part: Part) -> bool:
    """Tell whether a part of a tensor is a view of it."""
    return all(isinstance(kept, slice) for kept in part)


def take_part(tensor: Tensor, part: Part) -> Tensor:
    """Take a part of a tensor, as a view where it is one."""
    taken = tensor[tuple(kept if isinstance(kept, slice) else slice(None) for kept in part)]
    for dim, kept in enumerate(part):
        if isinstance(kept, Tensor):
            taken = taken.index_select(dim, kept.to(tensor.device))
    return taken if is_view(part) else taken.contiguous(memory_format=_find_format(tensor))


def mark_part(tensor: Tensor, part: Part) -> Tensor:
    """Mark the entries of a part of a tensor, as truth values of its shape."""
    marks = torch.ones_like(tensor, dtype=torch.bool)
    for dim, kept in enumerate(part):
        is_kept = torch.zeros(tensor.shape[dim], dtype=torch.bool)
        is_kept[kept] = True
        marks &= is_kept.to(tensor.device).view(-1, *[1] * (tensor.dim() - dim - 1))
    return marks


def make_level(net: nn.Module, widths: Widths, sizes: Sizes, parts: TensorParts) -> nn.Module:
    """Make a level: the network's modules anew, around parts of its tensors; norms are copied."""
    level = copy_module(net, {id(tensor): tensor for _, _, tensor in iterate_shared(net)})
    norms = dict(iterate_norms(level))
    whole = widths.written | widths.computed  # shared, as another tensor may come to be there
    for (path, name), part in parts.items():
        if path in whole:
            continue
        layer = level.get_submodule(path)
        tensor = getattr(layer, name)
        view = take_part(tensor.detach(), part)
        if path in norms:
            tensor.data = view.clone()
        elif name in layer._parameters:
            layer._parameters[name] = nn.Parameter(view, requires_grad=False)
        else:
            layer._buffers[name] = view
    for slot in _list_slots(widths):
        extent = sum(widths.extents(slot, sizes))
        layer = level.get_submodule(slot.module)
        resize_attributes(layer, slot.tensor, slot.dim, extent, slot.role == "depthwise")
    return level


def extract_level(level: nn.Module) -> nn.Module:
    """Make a level a network of its own, its tensors copied.

    It is faster where weights are large: a view has to be laid out anew for each product; docs/performance.md
    has by how much.
    """
    extracted = copy_module(level)
    for tensor in (*extracted.parameters(), *extracted.buffers()):
        tensor.data = tensor.detach().clone(memory_format=_find_format(tensor))
    return extracted


def iterate_shared(net: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Iterate over the tensors that levels share, all but those of norms: (layer, name, tensor)."""
    for path, layer in net.named_modules():
        if not _is_norm(layer):
            for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
                if tensor is not None:
                    yield path, name, tensor


def iterate_norms(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the norms of a network: (path, norm)."""
    return ((path, module) for path, module in net.named_modules() if _is_norm(module))


def _is_norm(layer: nn.Module) -> bool:
    """Tell whether a layer is a norm, by its class or by its tensors: numbers a channel, and statistics."""
    buffers = [tensor for tensor in layer._buffers.values() if tensor is not None]
    tensors = [tensor for tensor in layer._parameters.values() if tensor is not None] + buffers
    has_statistics = any(tensor.dim() == 1 and tensor.is_floating_point() for tensor in buffers)
    is_like_one = has_statistics and not layer._modules and all(tensor.dim() < 2 for tensor in tensors)
    return isinstance(layer, NORMS) or is_like_one


def _list_slots(widths: Widths) -> list[Slot]:
    return list(dict.fromkeys(slot for width in widths.values() for slot in width.slots))


def _find_format(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.shape[1] > 1
    return torch.channels_last if channels_last else torch.contiguous_format
