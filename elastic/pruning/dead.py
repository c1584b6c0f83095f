"""Find channels that do nothing: those that nothing reads, and those that nothing writes.

An unwritten channel may still carry a constant (a norm's shift, a bias). The network itself is asked for that
constant, at every layer that reads the channel.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elastic.pruning.gates import compute_mask
from elastic.widths.discovery import Slot, Width, Widths
from elastic.widths.parameters import get_weight
from elastic.widths.tracing import preserve_modes

# What a layer's forward has to be, for its input to be what its weight multiplies. Another one may do anything
# to it first (pad it, normalise it), so that no constant is known there.
LINEAR = (
    *(nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward),
    *(nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward),
)
# Noise of many scales, so that what saturates on one of them varies on another.
SCALES = (0, 0.1, 0.3, 1, 3, 10, 30, 100)
SPREAD = 1e-6  # relative; a map that varies by no more is a constant

Entries = Callable[[str, str], Tensor]  # (layer, tensor) -> what counts as written or read where it is not 0


class Reading(NamedTuple):
    """Hold the constants that one reader finds on a width's channels: (channels, copies), NaN where they vary."""

    slot: Slot
    values: Tensor


@torch.no_grad()
def find_removable_channels(model: nn.Module, widths: Widths, example: Tensor) -> dict[str, Tensor]:
    """Find, for each width that has any, the channels to keep when those that gates have shut off are dropped.

    Shut off: all gates of what reads them are closed; or all of what writes them, and they are exactly zero
    wherever they are read. Dropping them leaves the function as it is, so it can be done in the middle of
    training. A fresh channel, whose weights are zero but whose gates are open, stays; so does the last one.
    """

    @cache
    def read_mask(path: str, tensor: str) -> Tensor:
        return compute_mask(model.get_submodule(path), tensor)

    dead, silent = {}, {}
    for name, width in widths.items():
        if width.mixed is None:  # a norm over channels feels the dead ones too
            dead[name] = find_unread(widths, width, read_mask)
            silent[name] = find_unwritten(widths, width, read_mask) & ~dead[name]
    readers = {
        slot.module for name, mask in silent.items() if mask.any() for slot in widths[name].slots_with("in")
    }
    for seen in _observe_both_modes(model, readers, example) if readers else ():
        for name, mask in silent.items():
            if mask.any():
                for reading in read_constants(widths, widths[name], seen):
                    mask &= (reading.values == 0).all(1)
    keep = {}
    for name in dead:
        removable = dead[name] | silent[name]
        if removable.all():
            removable[0] = False
        if removable.any():
            keep[name] = (~removable).nonzero().flatten()
    return keep


def _observe_both_modes(
    model: nn.Module, readers: Iterable[str], example: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Yield the constants in evaluation mode, then those by the statistics of a batch."""
    with preserve_modes(model):
        yield observe_constants(model.eval(), readers, example)
    with torch.random.fork_rng(devices=[]):  # dropout draws
        yield observe_constants(copy.deepcopy(model).train(), readers, example)


def find_unread(widths: Widths, width: Width, entries: Entries) -> Tensor:
    """Find the channels whose entries are zero in all that reads them: (channels,)."""
    return _are_zero(widths, width, width.slots_with("in"), entries)


def find_unwritten(widths: Widths, width: Width, entries: Entries) -> Tensor:
    """Find the channels whose entries are zero in all that writes them: (channels,)."""
    return _are_zero(widths, width, width.slots_with("out"), entries)


def _are_zero(widths: Widths, width: Width, slots: Iterable[Slot], entries: Entries) -> Tensor:
    zero = torch.ones(width.size, dtype=torch.bool)
    for slot in slots:
        value = entries(slot.module, slot.tensor)
        positions = widths.positions(slot, width.name)
        lines = value.index_select(slot.dim, positions.flatten().to(value.device))
        others = [dim for dim in range(value.dim()) if dim != slot.dim]
        zero &= (lines == 0).all(others).cpu().view(positions.shape).all(1)
    return zero


# --- constants ------------------------------------------------------------------------------------------


def read_constants(widths: Widths, width: Width, seen: Mapping[str, Tensor]) -> list[Reading]:
    """Look up, for each reader of a width, what `observe_constants` has seen on the width's channels."""
    return [
        Reading(slot, _list_columns(widths, slot, seen)[widths.positions(slot, width.name)])
        for slot in width.slots_with("in")
    ]


def _list_columns(widths: Widths, slot: Slot, seen: Mapping[str, Tensor]) -> Tensor:
    """List the constant that each column of a reader's weight meets, NaN where that is not known."""
    columns = sum(widths.extents(slot))
    if slot.module not in seen:
        return torch.full((columns,), torch.nan)
    groups = seen[slot.module].view(-1, columns)
    if len(groups) == 1:
        return groups[0]
    # One column of a grouped convolution reads a channel of every group.
    return torch.where((groups == 0).all(0), 0.0, torch.nan)


@torch.no_grad()
def observe_constants(model: nn.Module, layers: Iterable[str], example: Tensor) -> dict[str, Tensor]:
    """Find, for each layer, the constant that each of its input channels holds, or NaN where it varies.

    The model runs, in the mode it is in, on noise of the example's shape. Layers whose forward is not that of a
    stock convolution or linear layer are left out.
    """
    noise = torch.randn((len(SCALES), *example.shape[1:]), generator=torch.Generator().manual_seed(0))
    noise *= torch.tensor(SCALES).view(-1, *[1] * (example.dim() - 1))
    device = next(model.parameters()).device
    with _watch(model, layers) as seen:
        model(noise.to(device, example.dtype))
    return {path: constants.cpu() for path, constants in seen.items()}


@contextmanager
def _watch(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record the constants of each layer's input channels while the model runs."""
    seen: dict[str, Tensor] = {}

    def look(path: str, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        constants = _find_constants(layer, args[0] if args else kwargs["input"])
        if path in seen:  # the layer is called several times
            constants = constants.where(constants == seen[path], torch.nan)
        seen[path] = constants

    hooks = []
    for path in layers:
        layer = model.get_submodule(path)
        if is_stock(layer, LINEAR):
            hooks.append(layer.register_forward_pre_hook(partial(look, path), with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _find_constants(layer: nn.Module, x: Tensor) -> Tensor:
    """Give the value of each channel that is the same everywhere in all samples, NaN for the others."""
    channel = x.dim() - get_weight(layer).dim() + 1
    others = [dim for dim in range(x.dim()) if dim != channel]
    low, high = x.detach().amin(others), x.detach().amax(others)
    return torch.where(high - low <= SPREAD * (1 + high.abs()), (low + high) / 2, torch.nan)


def is_stock(layer: nn.Module, forwards: Iterable[Callable[..., Tensor]]) -> bool:
    """Tell whether a layer's forward is one of torch's own, whatever its class."""
    return type(layer).forward in forwards and "forward" not in vars(layer)
