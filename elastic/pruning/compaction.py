"""Compaction: gates folded, dead channels removed, a plain module out, equal in output.

A channel is dead where nothing reads it, or where nothing writes it. The latter may still carry a constant
(a norm's shift, a bias). The network itself is asked for that constant at every reader, and the reader takes
it over: in its norm or bias where that is exact, else (behind zero padding, a constant map does not sum to a
constant) in one channel of the width that stays and carries the constants of all.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from elastic.pruning.gates import compute_mask, fold_gates
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import Slot, Width, Widths, find_widths
from elastic.widths.tracing import find_following_norms, preserve_modes

TINY = torch.finfo(torch.float32).tiny  # smaller numbers are denormal, and many times slower on CPUs


@torch.no_grad()
def compact(model: nn.Module, example: Tensor) -> nn.Module:
    """A plain copy of a (gated) model without its dead channels, in evaluation mode.

    Args:
        example: an input, batch first; its shape and type matter.
    """
    plain = fold_gates(model).eval()
    while True:
        for tensor in plain.parameters():
            tensor[tensor.abs() < TINY] = 0
        widths = find_widths(plain, example)
        keep = {}
        for name, (unread, unwritten, constants) in _dead(plain, widths, example).items():
            dead = _carry(plain, widths, widths[name], unread, unwritten, constants)
            if dead.any():
                keep[name] = (~dead).nonzero().flatten()
        if not keep:
            return plain
        reindex(plain, find_widths(plain, example), keep)  # found anew: a constant may have made a bias


@torch.no_grad()
def find_removable_channels(model: nn.Module, widths: Widths, example: Tensor) -> dict[str, Tensor]:
    """For each width that has any, the channels to keep when those that gates have shut off are dropped.

    Shut off: all gates of what reads them are closed; or all of what writes them, and they are exactly zero
    wherever they are read. Dropping them leaves the function as it is, so it can be done in the middle of
    training. A fresh channel, whose weights are zero but whose gates are open, stays; so does the last one.
    """
    keep = {}
    found = _dead(model, widths, example, compute_mask)
    readers = {slot.module for _, _, constants in found.values() for slot in constants}
    with torch.random.fork_rng(devices=[]):  # dropout draws
        training = _inputs(copy.deepcopy(model).train(), readers, example) if readers else {}
    for name, (unread, unwritten, constants) in found.items():
        for slot, values in constants.items():  # silent by the batch's statistics, too
            batch = training[slot.module][widths.positions(slot, name)]
            unwritten = unwritten & (batch == 0).all(1) & (values == 0).all(1)
        dead = unread | unwritten
        if dead.all():
            dead[0] = False
        if dead.any():
            keep[name] = (~dead).nonzero().flatten()
    return keep


Dead = tuple[Tensor, Tensor, dict[Slot, Tensor]]


def _weights(layer: nn.Module, tensor: str) -> Tensor:
    value: Tensor = getattr(layer, tensor)
    return value.detach()


def _dead(
    model: nn.Module, widths: Widths, example: Tensor, what: Callable[[nn.Module, str], Tensor] = _weights
) -> dict[str, Dead]:
    """Per width with dead channels: which nothing reads, which nothing writes, the constants they carry."""
    found: dict[str, Dead] = {}
    for name, width in widths.items():
        if width.mixed is None:  # a norm over channels feels the dead ones too
            unread = _zero(model, widths, width, width.slots_with("in"), what)
            unwritten = _zero(model, widths, width, width.slots_with("out"), what) & ~unread
            if unread.any() or unwritten.any():
                found[name] = (unread, unwritten, {})
    readers = {
        slot for name, dead in found.items() if dead[1].any() for slot in widths[name].slots_with("in")
    }
    with preserve_modes(model):
        seen = _inputs(model.eval(), {slot.module for slot in readers}, example) if readers else {}
    for name, (_, unwritten, constants) in found.items():
        if unwritten.any():
            for slot in widths[name].slots_with("in"):
                constants[slot] = seen[slot.module][widths.positions(slot, name)]
    return found


def _zero(
    model: nn.Module,
    widths: Widths,
    width: Width,
    slots: Iterable[Slot],
    what: Callable[[nn.Module, str], Tensor],
) -> Tensor:
    """Whether each channel's entries are all zero in all of the slots: (channels,)."""
    zero = torch.ones(width.size, dtype=torch.bool)
    for slot in slots:
        value = what(model.get_submodule(slot.module), slot.tensor).cpu()
        by_position = (value == 0).transpose(0, slot.dim).flatten(1).all(1)
        zero &= by_position[widths.positions(slot, width.name)].all(1)
    return zero


def _inputs(model: nn.Module, readers: Iterable[str], example: Tensor) -> dict[str, Tensor]:
    """For each layer, the constant that each of its input channels holds, or NaN where it varies.

    Found by running the model, in the mode it is in, on noise of the example's shape.
    """
    seen: dict[str, Tensor] = {}

    def look(path: str, layer: Any, x: Tensor) -> None:
        channel = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
        x = x.detach().transpose(0, channel).flatten(1)
        low, high = x.amin(1), x.amax(1)
        value = torch.where(high - low <= 1e-6 * (1 + high.abs()), (low + high) / 2, torch.nan)
        if getattr(layer, "groups", 1) > 1:  # one column of the weight reads a channel of every group
            value = value.view(layer.groups, -1)
            value = torch.where((value == 0).all(0), 0.0, torch.nan)
        held = seen.get(path)
        seen[path] = value.cpu() if held is None else torch.where(held == value.cpu(), held, torch.nan)

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda layer, args, path=path: look(path, layer, args[0])
        )
        for path in readers
    ]
    # Noise of many scales, so that what saturates on one of them varies on another.
    scales = torch.tensor([0, 0.1, 0.3, 1, 3, 10, 30, 100]).view(-1, *[1] * (example.dim() - 1))
    noise = torch.randn((8, *example.shape[1:]), generator=torch.Generator().manual_seed(0)) * scales
    try:
        model(noise.to(next(model.parameters()).device, example.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _carry(
    model: nn.Module,
    widths: Widths,
    width: Width,
    unread: Tensor,
    unwritten: Tensor,
    constants: dict[Slot, Tensor],
) -> Tensor:
    """Move the constants of unwritten channels into what reads them; which channels can go: (channels,)."""
    into_bias, into_channel, carrier = _plan(model, unwritten, constants)
    dead = unread.clone()
    dead[into_bias + into_channel] = True
    if dead.all():  # one stays, with its constant
        last = int(unread.nonzero()[0]) if unread.any() else into_bias[0]
        dead[last] = False
        into_bias = [channel for channel in into_bias if channel != last]
    for channel in into_bias + into_channel:
        for slot, values in constants.items():
            if channel in into_channel and _pads(model.get_submodule(slot.module)):
                ratio = torch.where(values[carrier] == 0, 0.0, values[channel] / values[carrier])
                _into_channel(model, widths, width, slot, channel, carrier, ratio)
            else:
                _into_bias(model, widths, width, slot, channel, values[channel])
    return dead


def _plan(
    model: nn.Module, unwritten: Tensor, constants: dict[Slot, Tensor]
) -> tuple[list[int], list[int], int]:
    """Which channels' constants go into biases, which into one channel of their own, and into which one."""
    steady = unwritten.clone()
    for values in constants.values():
        steady &= ~values.isnan().any(1)
    padded = [values for slot, values in constants.items() if _pads(model.get_submodule(slot.module))]
    felt = torch.zeros_like(steady)
    for values in padded:
        felt |= (values != 0).any(1)
    into_bias, rest = ((steady & mask).nonzero().flatten().tolist() for mask in (~felt, felt))
    readers = [values[rest] for values in padded if len(rest) and (values[rest] != 0).any()]
    if not readers:
        return into_bias, [], 0
    strength = torch.stack([values.abs().amin(1) for values in readers]).amin(0)
    best = int(strength.argmax())
    if strength[best] == 0:
        return into_bias, [], 0
    return into_bias, [channel for channel in rest if channel != rest[best]], rest[best]


def _pads(layer: nn.Module) -> bool:
    """Whether a reader sees zeros beyond a constant map's border."""
    if not isinstance(layer, nn.modules.conv._ConvNd) or layer.padding_mode != "zeros":
        return False
    wide = any(size > 1 for size in layer.kernel_size)
    return layer.padding == "same" and wide if isinstance(layer.padding, str) else any(layer.padding)


def _into_bias(
    model: nn.Module, widths: Widths, width: Width, slot: Slot, channel: int, values: Tensor
) -> None:
    """Add what the constant contributes to the norm that follows the reader, else to its bias."""
    if not values.any():
        return
    layer: Any = model.get_submodule(slot.module)
    weight: Tensor = layer.weight
    columns = weight[:, widths.positions(slot, width.name)[channel]]
    added = columns.reshape(*columns.shape[:2], -1).sum(2) @ values.to(columns)
    norm = find_following_norms(model).get(slot.module)
    mean = None if norm is None else model.get_submodule(norm).running_mean
    if isinstance(mean, Tensor):
        mean.sub_(added)
    elif layer.bias is None:
        layer.bias = nn.Parameter(added)
    else:
        layer.bias.data.add_(added)


def _into_channel(
    model: nn.Module, widths: Widths, width: Width, slot: Slot, channel: int, carrier: int, ratio: Tensor
) -> None:
    weight: Tensor = model.get_submodule(slot.module).weight  # type: ignore[assignment]
    places = widths.positions(slot, width.name)
    shape = (1, -1, *[1] * (weight.dim() - 2))
    weight[:, places[carrier]] += weight[:, places[channel]] * ratio.to(weight).view(shape)
