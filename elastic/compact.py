"""Compaction: gates folded, dead channels removed, a plain module out, equal in output.

A channel is dead where nothing reads it, or where nothing writes it. The latter may still carry a constant
(a norm's shift, a bias). The network itself is asked for that constant at every reader, and the reader takes
it over: in its norm or bias where that is exact, else (behind zero padding, a constant map does not sum to a
constant) in one channel of the width that stays and carries the constants of all.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from elastic.gates import fold, openings
from elastic.surgery import reindex
from elastic.trace import norm_after
from elastic.widths import Slot, Width, Widths, discover

TINY = torch.finfo(torch.float32).tiny  # smaller numbers are denormal, and many times slower on CPUs


@torch.no_grad()
def compact(model: nn.Module, example: Tensor) -> nn.Module:
    """A plain copy of a (gated) model without its dead channels, in evaluation mode.

    Args:
        example: an input, batch first; its shape and type matter.
    """
    plain = fold(model).eval()
    for tensor in plain.parameters():
        tensor[tensor.abs() < TINY] = 0
    while True:
        widths = discover(plain, example)
        found = _dead(plain, widths, example)
        keep = {}
        for name, (unread, unwritten, constants) in found.items():
            dead = unread | _carry(plain, widths, widths[name], unwritten, constants)
            if dead[1:].any() or (dead.any() and len(dead) > 1):
                keep[name] = _alive(dead)
        if not keep:
            return plain
        reindex(plain, widths, keep)


@torch.no_grad()
def silent(model: nn.Module, widths: Widths, example: Tensor) -> dict[str, Tensor]:
    """For each width that has any, the channels to keep when those that gates have shut off are dropped.

    Shut off: all gates of what reads them are closed; or all of what writes them, and they are exactly zero
    wherever they are read. Dropping them leaves the function as it is, so it can be done in the middle of
    training. A fresh channel, whose weights are zero but whose gates are open, stays; so does the last one.
    """
    keep = {}
    for name, (unread, unwritten, constants) in _dead(model, widths, example, openings).items():
        for values in constants.values():
            unwritten = unwritten & (values == 0).all(1)
        dead = unread | unwritten
        if dead.any() and len(dead) > 1:
            keep[name] = _alive(dead)
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
            unread = _zero(model, widths, width, width.role("in"), what)
            unwritten = _zero(model, widths, width, width.role("out"), what) & ~unread
            if unread.any() or unwritten.any():
                found[name] = (unread, unwritten, {})
    readers = {slot for name, dead in found.items() if dead[1].any() for slot in widths[name].role("in")}
    seen = _inputs(model, {slot.module for slot in readers}, example) if readers else {}
    for name, (_, unwritten, constants) in found.items():
        if unwritten.any():
            for slot in widths[name].role("in"):
                constants[slot] = seen[slot.module][widths.positions(slot, name)]
    return found


def _alive(dead: Tensor) -> Tensor:
    kept = (~dead).nonzero().flatten()
    return kept if len(kept) else torch.zeros(1, dtype=torch.long)


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

    Found by running the model, in evaluation mode, on noise of the example's shape.
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
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    noise = torch.randn((4, *example.shape[1:]), generator=torch.Generator().manual_seed(0))
    try:
        model.eval()(noise.to(device))
    finally:
        for module, mode in training.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    return seen


def _carry(
    model: nn.Module, widths: Widths, width: Width, unwritten: Tensor, constants: dict[Slot, Tensor]
) -> Tensor:
    """Move the constants of unwritten channels into their readers; which channels can go: (channels,)."""
    gone = torch.zeros_like(unwritten)
    if not unwritten.any():
        return gone
    steady = unwritten.clone()
    for values in constants.values():
        steady &= ~values.isnan().any(1)
    padded = {slot for slot in constants if _pads(model.get_submodule(slot.module))}
    felt = torch.zeros_like(steady)  # by a reader behind zero padding
    for slot in padded:
        felt |= (constants[slot] != 0).any(1)
    for channel in (steady & ~felt).nonzero().flatten().tolist():
        for slot, values in constants.items():
            _into_bias(model, widths, width, slot, channel, values[channel])
        gone[channel] = True
    rest = (steady & felt).nonzero().flatten().tolist()
    if len(rest) > 1:
        strength = torch.stack([constants[slot].abs().amin(1) for slot in padded]).amin(0)
        carrier = max(rest, key=lambda channel: float(strength[channel]))
        if strength[carrier] > 0:
            for channel in rest:
                if channel != carrier:
                    for slot, values in constants.items():
                        if slot in padded:
                            ratio = values[channel] / values[carrier]
                            _into_channel(model, widths, width, slot, channel, carrier, ratio)
                        else:
                            _into_bias(model, widths, width, slot, channel, values[channel])
                    gone[channel] = True
    return gone


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
    norm = norm_after(model).get(slot.module)
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
