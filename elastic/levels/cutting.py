"""Cut levels out of a network: its modules anew, around the first channels of its tensors."""

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
TensorParts = dict[tuple[str, str], tuple[slice, ...]]  # (layer, tensor) -> the part that a level has


def find_nestable(widths: Widths) -> list[str]:
    """Find the widths whose first channels lie side by side in every tensor, so that a level can be a view.

    Those that a concatenation, a split or groups interleave with others do not, but for the last of them. Of
    weights that the forward itself changes there are no views: it may assign others. Part of a weight that
    weight norm computes would have another norm.
    """
    slots = (slot for width in widths.values() for slot in width.slots)
    interleaved = {segment.width for slot in slots for segment in slot.layout[:-1]}
    return [name for name in widths if name not in interleaved | _find_whole(widths).keys()]


def _find_whole(widths: Widths) -> dict[str, str]:
    """Find the widths of weights that have no parts, with reasons."""
    reasons = dict.fromkeys(widths.computed, "of weights that weight norm computes (remove it first)")
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
        whole = _find_whole(widths)
        reason = f"is {whole[name]}" if name in whole else "lies between others' channels"
        raise StructureError(
            f"width '{name}' {reason}, so that no level can have a part of it: leave it whole"
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
    reasons = ["lie between others' channels", *(f"are {reason}" for reason in _find_whole(widths).values())]
    reason = " or ".join(dict.fromkeys(reasons))
    return f"all widths ({', '.join(widths)}) {reason}, which leaves no room for a level"


def cut_tensors(widths: Widths, sizes: Sizes) -> TensorParts:
    """Find what a level has of each tensor: from the first channel to its last, along every dimension."""
    ends: dict[tuple[str, str], dict[int, slice]] = {}
    for slot in _list_slots(widths):
        if is_stored(slot.tensor):
            end = slice(_measure_extent(widths, slot, sizes))
            ends.setdefault((slot.module, slot.tensor), {})[slot.dim] = end
    return {
        key: tuple(by_dim.get(d, slice(None)) for d in range(1 + max(by_dim))) for key, by_dim in ends.items()
    }


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
        view = tensor.detach()[part]
        if path in norms:
            tensor.data = view.clone()
        elif name in layer._parameters:
            layer._parameters[name] = nn.Parameter(view, requires_grad=False)
        else:
            layer._buffers[name] = view
    for slot in _list_slots(widths):
        extent = _measure_extent(widths, slot, sizes)
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


def _measure_extent(widths: Widths, slot: Slot, sizes: Sizes) -> int:
    """Count the positions of a slot that a level has; only the last segment may be cut."""
    last = slot.layout[-1]
    removed = widths[last.width].size - sizes[last.width] if last.width is not None else 0
    return sum(widths.extents(slot)) - removed * last.repeat


def _find_format(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.shape[1] > 1
    return torch.channels_last if channels_last else torch.contiguous_format
