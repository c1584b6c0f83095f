"""Nest levels: sub-networks of one model, each a prefix of all its widths, in the model's own storage.

A level's convolutions and linear layers hold views of the model's tensors: what one of them learns, all that
contain it have. Where a concatenation, a split or groups put the channels of a level between others', its
part of a tensor is a copy, taken anew with the level. Norms are a level's own, affine and statistics, since
what they see depends on the level (switchable batch norm, Yu et al., arXiv 1812.08928, section 3.3).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, fx, nn

from elastic.errors import StructureError
from elastic.levels.cutting import (
    Sizes,
    check_sizes,
    cut_tensors,
    is_view,
    iterate_norms,
    iterate_shared,
    make_level,
    take_part,
)
from elastic.levels.settings import Settings, follow_modes
from elastic.levels.views import hold_in_backward, hold_views
from elastic.pruning.gates import iterate_gates
from elastic.widths.matching import require_widths
from elastic.widths.operations.interface import is_stored
from elastic.widths.tracing import sync_traced
from elastic.widths.width import Widths


class Levels(Sequence[nn.Module]):
    """Hold the levels of a network, smallest first; the last one is the network itself.

    `levels[k]` is a plain module: running another level is calling another module. Nothing is shared that a
    forward pass in evaluation mode would write to, so that threads may run different levels at once. Train
    through `run`, which leads gradients to the network's parameters, and take `levels[k]` anew afterwards.

    Args:
        net: the largest level; gates must have been folded.
        sizes: the channels of every width, for each level below the network, smallest first. A width that
            is left out stays whole.

    Attributes:
        norms: the norms of the levels below the network, one dictionary a level; they are to be trained and
            saved with it.
        cuts: of each level, the part that it has of each tensor.

    Raises:
        StructureError: levels that are not each a part of the next, a width that cannot be cut.
    """

    def __init__(self, net: nn.Module, widths: Widths, sizes: Sequence[Sizes]) -> None:
        if any(iterate_gates(net)):
            raise StructureError("a gated network has no levels: compact it first, then make them")
        require_widths(net, widths)
        full = widths.sizes()
        self.net, self.widths = net, widths
        self.sizes: list[dict[str, int]] = [*({**full, **level} for level in sizes), full]
        check_sizes(widths, self.sizes)
        self.cuts = [cut_tensors(widths, level) for level in self.sizes]
        below = zip(self.sizes[:-1], self.cuts, strict=False)
        self._levels = [*(make_level(net, widths, level, cut) for level, cut in below), net]
        self._shared = {(path, name) for path, name, _ in iterate_shared(net)}
        self._copied = [
            [key for key in cut if key in self._shared and not is_view(cut[key])] for cut in self.cuts
        ]
        self.norms = nn.ModuleList(map(_collect_norms, self._levels[:-1]))
        self._settings: Settings | None = Settings(net, self._levels[:-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_settings": None}

    def _complete(self) -> None:
        """Let the levels of a copy be parts of its own network, once all of that has been copied."""
        if self._settings is None:
            self._settings = Settings(self.net, self._levels[:-1])
            self.refresh()

    def _renew(self, k: int, keys: Iterable[tuple[str, str]]) -> None:
        """Take the parts again that level k has of tensors: (layer, name)."""
        for path, name in keys:
            tensor: Tensor = getattr(self.net.get_submodule(path), name)
            held: Tensor = getattr(self._levels[k].get_submodule(path), name)
            with torch.inference_mode(False):
                held.data = take_part(tensor.detach(), self.cuts[k].get((path, name), ()))

    @overload
    def __getitem__(self, k: int) -> nn.Module: ...
    @overload
    def __getitem__(self, k: slice) -> list[nn.Module]: ...
    def __getitem__(self, k: int | slice) -> nn.Module | list[nn.Module]:
        self._complete()
        places = range(len(self))[k]
        for place in (places,) if isinstance(places, int) else places:
            self._renew(place, self._copied[place])
        return self._levels[k]

    def __len__(self) -> int:
        return len(self._levels)

    def run(self, k: int, *inputs: Any, traced: fx.GraphModule | None = None, **named: Any) -> Any:
        """Run level k in training: gradients reach the network's own parameters, and the level's norms.

        Args:
            k: the level.
            inputs, named: what the network is called with.
            traced: what is made of the level's own layers, and is called in its place.
        """
        self._complete()
        level = self._levels[k]
        net = level if traced is None else traced
        if level is self.net:
            return net(*inputs, **named)
        self._sync(level)
        if traced is not None:
            sync_traced(traced, level, level.training)
        views = list(self._iterate_views(k))
        with hold_views(net, views):
            output = net(*inputs, **named)
        trained = [entry for entry in views if entry[-1].requires_grad]
        hold_in_backward(output, partial(hold_views, net, trained))
        return output

    def _sync(self, level: nn.Module) -> None:
        """Let a level follow what a program has set in the network: modes, numbers and texts."""
        assert self._settings is not None
        self._settings.follow()
        level.train(self.net.training)
        follow_modes(self.net, level)

    def _iterate_views(self, k: int) -> Iterator[tuple[str, str, Tensor]]:
        """Iterate over what level k has of the network's tensors: (layer, name, view)."""
        for path, name, tensor in self._iterate_shared():
            yield path, name, take_part(tensor, self.cuts[k].get((path, name), ()))

    def _iterate_shared(self) -> Iterator[tuple[str, str, Tensor]]:
        """Iterate over the tensors that levels share; they have no modules that a program has added since."""
        return (item for item in iterate_shared(self.net) if item[:2] in self._shared)

    def refresh(self) -> None:
        """Look for the storage again: to be called when tensors have moved (to a device, by surgery)."""
        for k in range(len(self) - 1):
            self._renew(k, ((path, name) for path, name, _ in self._iterate_shared()))

    @torch.no_grad()
    def permute(self, index: Mapping[str, Tensor]) -> None:
        """Permute the channels of the levels' norms, as the network's own have been.

        Levels that the permutation leads out of are left: `copy_norms` gives them norms.

        Args:
            index: for a width, the old channel that each channel now is.
        """
        for level, sizes in zip(self[:-1], self.sizes, strict=False):
            norms = dict(iterate_norms(level))
            for name, channels in index.items():
                level_channels = channels[: sizes[name]]
                if level_channels.max() < sizes[name]:
                    self._permute_norms(norms, name, level_channels, sizes)
        self.refresh()

    def _permute_norms(self, norms: Mapping[str, nn.Module], name: str, index: Tensor, sizes: Sizes) -> None:
        """Permute the channels of a width in all norms of a level of these sizes, by path."""
        for slot in self.widths[name].slots:
            if slot.module in norms and is_stored(slot.tensor):
                positions = self.widths.positions(slot, name, sizes)  # (channels, copies)
                _permute_tensor(getattr(norms[slot.module], slot.tensor), slot.dim, positions, index)

    @torch.no_grad()
    def copy_norms(self, k: int) -> None:
        """Copy the norms of the next level to level k, as far as it has their channels."""
        larger = dict(iterate_norms(self[k + 1]))
        parts = cut_tensors(self.widths, self.sizes[k], self.sizes[k + 1])
        for path, norm in iterate_norms(self[k]):
            for name, tensor in norm.state_dict(keep_vars=True).items():
                tensor.copy_(take_part(getattr(larger[path], name), parts.get((path, name), ())))


def _permute_tensor(tensor: Tensor, dim: int, positions: Tensor, index: Tensor) -> None:
    """Permute channels along a dimension, in place: all copies of each, which lie at these positions."""
    order = torch.arange(tensor.shape[dim])
    order[positions.flatten()] = positions[index].flatten()
    tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


def _collect_norms(level: nn.Module) -> nn.ModuleDict:
    """Collect the norms of a level by path, with slashes: dots have a meaning of their own in names."""
    return nn.ModuleDict({path.replace(".", "/"): norm for path, norm in iterate_norms(level)})
