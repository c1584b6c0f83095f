"""Nested levels: sub-networks of one model, each a prefix of all its widths, in the model's own storage.

A level's convolutions and linear layers hold views of the model's tensors: what one of them learns, all that
contain it have. Norms are a level's own, affine and statistics, since what they see depends on the level
(switchable batch norm, Yu et al., arXiv 1812.08928, section 3.3).
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from elastic.errors import StructureError
from elastic.surgery.layers import NORMS, resize_attributes
from elastic.widths.discovery import Slot, Widths

Sizes = Mapping[str, int]
Cut = dict[tuple[str, str], tuple[slice, ...]]  # of each tensor of a layer, the part that a level holds


class Levels(Sequence[nn.Module]):
    """The levels of a network, smallest first; the last one is the network itself.

    `levels[k]` is a plain module: running another level is calling another module. Nothing is copied, and
    nothing is shared that a forward pass in evaluation mode would write to, so that threads may run
    different levels at once. Train through `forward`, which leads gradients to the network's parameters.

    Args:
        net: the largest level; gates must have been folded.
        sizes: the channels of every width, for each level below the network, smallest first. A width that
            is left out stays whole.

    Attributes:
        norms: the norms of the levels below the network, one dictionary a level; they are to be trained and
            saved with it.

    Raises:
        StructureError: levels that are not each a part of the next, a width that cannot be cut.
    """

    def __init__(self, net: nn.Module, widths: Widths, sizes: Sequence[Sizes]) -> None:
        if any(parametrize.is_parametrized(module) for module in net.modules()):
            raise StructureError("a gated network has no levels: compact it first, then make them")
        full = widths.sizes()
        self.net, self.widths = net, widths
        self.sizes: list[dict[str, int]] = [*({**full, **level} for level in sizes), full]
        _check(widths, self.sizes)
        self.cuts = [_cut(widths, level) for level in self.sizes]
        self._levels = [
            *(_prefix(net, widths, *both) for both in zip(self.sizes[:-1], self.cuts, strict=False)),
            net,
        ]
        self.norms = nn.ModuleList(map(_norms, self._levels[:-1]))

    @overload
    def __getitem__(self, k: int) -> nn.Module: ...
    @overload
    def __getitem__(self, k: slice) -> list[nn.Module]: ...
    def __getitem__(self, k: int | slice) -> nn.Module | list[nn.Module]:
        return self._levels[k]

    def __len__(self) -> int:
        return len(self._levels)

    def forward(self, k: int, x_BCHW: Tensor, traced: nn.Module | None = None) -> Tensor:
        """Level k in training: gradients reach the network's own parameters, and the level's norms.

        Args:
            k: the level.
            x_BCHW: images.
            traced: what is made of the level's own layers, and is called in its place.
        """
        level = self._levels[k]
        called = level if traced is None else traced
        if level is self.net:
            return called(x_BCHW)  # type: ignore[no-any-return]
        level.train(self.net.training)
        views = {f"{path}.{tensor}".lstrip("."): view for path, tensor, view in self.views(k)}
        return functional_call(called, views, (x_BCHW,))  # type: ignore[no-any-return]

    def views(self, k: int) -> Iterator[tuple[str, str, Tensor]]:
        """The tensors that level k shares, whole or in part: (layer, tensor, the network's part)."""
        shared = [(path, m) for path, m in self.net.named_modules() if not isinstance(m, NORMS)]
        for path, layer in shared:
            for tensor, held in (*layer._parameters.items(), *layer._buffers.items()):
                if held is not None:
                    yield path, tensor, held[self.cuts[k].get((path, tensor), ())]

    def refresh(self) -> None:
        """Look for the storage anew: to be called when tensors have moved (to a device, by surgery)."""
        for k, level in enumerate(self._levels[:-1]):
            for path, tensor, view in self.views(k):
                getattr(level.get_submodule(path), tensor).data = view.detach()

    @torch.no_grad()
    def permute(self, index: Mapping[str, Tensor]) -> None:
        """Permute the channels of the levels' norms, as the network's own have been.

        Levels that the permutation leads out of are left: `copy_norms` gives them norms.

        Args:
            index: for a width, the old channel that each channel now is.
        """
        for level, sizes in zip(self._levels[:-1], self.sizes, strict=False):
            for name in (name for name in index if index[name][: sizes[name]].max() < sizes[name]):
                for slot in self.widths[name].slots:
                    layer = level.get_submodule(slot.module)
                    if isinstance(layer, NORMS) and slot.tensor:
                        held = getattr(layer, slot.tensor)
                        lie = self.widths.positions(slot, name)
                        places = torch.arange(held.shape[slot.dim])
                        places[lie[: sizes[name]].flatten()] = lie[index[name][: sizes[name]]].flatten()
                        held.copy_(held.index_select(slot.dim, places.to(held.device)))
        self.refresh()

    @torch.no_grad()
    def copy_norms(self, k: int) -> None:
        """Level k's norms start from those of the next level."""
        for module, source in zip(self[k].modules(), self[k + 1].modules(), strict=True):
            if isinstance(module, NORMS):
                for name, tensor in module.state_dict(keep_vars=True).items():
                    held = getattr(source, name)
                    tensor.copy_(held[tuple(map(slice, tensor.shape))])


def extract_level(level: nn.Module) -> nn.Module:
    """A level as a network of its own, its tensors copied.

    It is faster where weights are large: a view has to be laid out anew for each product (see README).
    """
    twin = copy.deepcopy(level)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data = tensor.detach().clone(memory_format=_format(tensor))
    return twin


def _format(tensor: Tensor) -> torch.memory_format:
    last = tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.shape[1] > 1
    return torch.channels_last if last else torch.contiguous_format


def find_nestable(widths: Widths) -> list[str]:
    """The widths whose first channels lie side by side in every tensor, so that a level can be a view.

    Those that a concatenation, a split or groups interleave with others do not, but for the last of them.
    """
    slots = (slot for width in widths.values() for slot in width.slots)
    inner = {segment.width for slot in slots for segment in slot.layout[:-1]}
    return [name for name in widths if name not in inner]


def _check(widths: Widths, sizes: Sequence[Sizes]) -> None:
    can = find_nestable(widths)
    for name in (name for level in sizes for name in level):
        widths[name]  # or it says why that width cannot change
    for k, (small, large) in enumerate(pairwise(sizes)):
        for name, size in small.items():
            if size < 1:
                raise StructureError(f"level {k} leaves width '{name}' without a channel: ask for more of it")
            if size > large[name]:
                raise StructureError(
                    f"level {k} has {size} channels of '{name}', level {k + 1} has {large[name]}: "
                    "give levels from small to large"
                )
            if name not in can and size != widths[name].size:
                raise StructureError(
                    f"width '{name}' lies between others' channels, so that no level can hold a part of it: "
                    "leave it whole"
                )
        if small == large:
            raise StructureError(f"levels {k} and {k + 1} are the same: ask for larger steps between them")


def _cut(widths: Widths, sizes: Sizes) -> Cut:
    """What a level holds of each tensor: from the first channel to its last, along every dimension."""
    found: dict[tuple[str, str], dict[int, slice]] = {}
    for slot in dict.fromkeys(slot for width in widths.values() for slot in width.slots):
        if slot.tensor:
            end = slice(_extent(widths, slot, sizes))
            found.setdefault((slot.module, slot.tensor), {})[slot.dim] = end
    return {key: tuple(at.get(d, slice(None)) for d in range(1 + max(at))) for key, at in found.items()}


def _extent(widths: Widths, slot: Slot, sizes: Sizes) -> int:
    """Positions of a slot that a level has; only the last segment may be cut."""
    last = slot.layout[-1]
    cut = widths[last.width].size - sizes[last.width] if last.width is not None else 0
    return sum(widths.extents(slot)) - cut * last.repeat


def _prefix(net: nn.Module, widths: Widths, sizes: Sizes, cut: Cut) -> nn.Module:
    """A level: the network's modules anew, around parts of its tensors; norms are copied."""
    shared = (m for m in net.modules() if not isinstance(m, NORMS))
    tensors = [t for m in shared for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    level = copy.deepcopy(net, {id(tensor): tensor for tensor in tensors})
    for (path, tensor), part in cut.items():
        layer = level.get_submodule(path)
        value = getattr(layer, tensor)
        view = value.detach()[part]
        if isinstance(layer, NORMS):
            value.data = view.clone()
        elif tensor in layer._parameters:
            layer._parameters[tensor] = nn.Parameter(view, requires_grad=False)
        else:
            layer._buffers[tensor] = view
    for slot in dict.fromkeys(slot for width in widths.values() for slot in width.slots):
        layer = level.get_submodule(slot.module)
        resize_attributes(
            layer, slot.tensor, slot.dim, _extent(widths, slot, sizes), slot.role == "depthwise"
        )
    return level


def _norms(level: nn.Module) -> nn.ModuleDict:
    """The norms of a level by path, with slashes: dots have a meaning of their own in names."""
    return nn.ModuleDict(
        {path.replace(".", "/"): m for path, m in level.named_modules() if isinstance(m, NORMS)}
    )
