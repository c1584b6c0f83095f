"""Compact a network: gates folded, dead channels removed, a plain module out, equal in output.

A channel is dead where nothing reads it, or where nothing writes it. The constant that the latter may carry is
taken over by what reads it: by its norm or bias where that is exact, else (behind zero padding, a constant map
does not sum to a constant) by one channel of the width that stays and carries the constants of all.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elastic.pruning.dead import (
    Reading,
    find_unread,
    find_unwritten,
    is_stock,
    observe_constants,
    read_constants,
)
from elastic.pruning.gates import fold_gates
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import Width, Widths, find_widths
from elastic.widths.tracing import Role, find_following_norms

TINY = torch.finfo(torch.float32).tiny  # smaller numbers are denormal, and many times slower on CPUs
CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


@torch.no_grad()
def compact(model: nn.Module, example: Tensor) -> nn.Module:
    """Make a plain copy of a (gated) model without its dead channels, in evaluation mode.

    Args:
        example: an input, batch first; its shape and type matter.
    """
    plain = fold_gates(model).eval()
    norms = find_following_norms(plain)  # the same whatever is removed
    while True:
        flush_denormals(plain)
        # Discovered anew: a grouped convolution with one channel left in each group is a depthwise one.
        widths = find_widths(plain, example)
        keep = Emptying(plain, widths, norms, example).empty_dead_channels()
        if not keep:
            return plain
        reindex(plain, widths, keep)


def flush_denormals(model: nn.Module) -> None:
    """Set to zero what is so small that CPUs take many times as long for it."""
    for tensor in model.parameters():
        tensor.masked_fill_(tensor.abs() < TINY, 0)


class Move(NamedTuple):
    """Say where the constants of unwritten channels go: channels by number."""

    into_bias: Tensor
    into_carrier: Tensor
    carrier: int = 0


@dataclass
class Emptying:
    """Empty the dead channels of a plain model: all that they still tell is moved, all that reads them is zero.

    Emptying a channel may leave another one unread or unwritten, so widths whose tensors have changed are looked
    at again, until nothing changes. No step changes the function, so the constants are observed once.
    """

    model: nn.Module
    widths: Widths
    norms: dict[str, str]
    example: Tensor
    dead: dict[str, Tensor] = field(default_factory=dict)  # by width: (channels,)

    def empty_dead_channels(self) -> dict[str, Tensor]:
        """Empty all dead channels; give, for each width that has any, those to keep, one at least."""
        pending = {name: None for name, width in self.widths.items() if width.mixed is None}
        self.dead = {name: torch.zeros(self.widths[name].size, dtype=torch.bool) for name in pending}
        while pending:
            name = next(iter(pending))
            del pending[name]
            if self._empty(self.widths[name]):
                pending |= dict.fromkeys(self._neighbours[name])
        keep = {}
        for name, dead in self.dead.items():
            if dead.all():
                dead[0] = False  # it is empty, and does no harm
            if dead.any():
                keep[name] = (~dead).nonzero().flatten()
        return keep

    def _empty(self, width: Width) -> bool:
        """Empty the channels of one width that are dead by now; tell whether there were any new ones."""
        dead = self.dead[width.name]
        unread = find_unread(self.widths, width, self._entries) & ~dead
        self._clear(width, "out", unread)
        dead |= unread
        unwritten = find_unwritten(self.widths, width, self._entries) & ~dead
        if not unwritten.any() or self._is_tied(width):
            return bool(unread.any())
        readings = read_constants(self.widths, width, self._constants)
        move = plan_move(self.model, unwritten, readings)
        moved = torch.zeros_like(dead)
        moved[torch.cat([move.into_bias, move.into_carrier])] = True
        for reading in readings:
            self._apply(move, width, reading)
        self._clear(width, "in", moved)
        dead |= moved
        return bool((unread | moved).any())

    def _entries(self, module: str, tensor: str) -> Tensor:
        value: Tensor = getattr(self.model.get_submodule(module), tensor)
        return value.detach()

    @cached_property
    def _constants(self) -> dict[str, Tensor]:
        readers = {slot.module for width in self.widths.values() for slot in width.slots_with("in")}
        return observe_constants(self.model, readers, self.example)

    @cached_property
    def _neighbours(self) -> dict[str, list[str]]:
        """List, for each width, those that lie on the same layers."""
        by_layer = defaultdict(list)
        for name in self.dead:
            for module in {slot.module for slot in self.widths[name].slots if slot.role in ("in", "out")}:
                by_layer[module].append(name)
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for names in by_layer.values():
            for name in names:
                found[name] |= dict.fromkeys(names)
        return {name: list(others) for name, others in found.items()}

    def _is_tied(self, width: Width) -> bool:
        """Tell whether two readers share their weight: what one takes over, the other would take over too."""
        weights = [self._entries(slot.module, slot.tensor) for slot in width.slots_with("in")]
        return len({weight.data_ptr() for weight in weights}) < len(weights)

    def _clear(self, width: Width, role: Role, channels: Tensor) -> None:
        """Set to zero what writes, or what reads, the channels."""
        if channels.any():
            for slot in width.slots_with(role):
                weight = self._entries(slot.module, slot.tensor)
                positions = self.widths.positions(slot, width.name)[channels].flatten()
                weight.index_fill_(slot.dim, positions.to(weight.device), 0)

    def _apply(self, move: Move, width: Width, reading: Reading) -> None:
        """Let one reader take over what the moved channels tell it."""
        slot, values = reading
        positions = self.widths.positions(slot, width.name)
        layer = self.model.get_submodule(slot.module)
        weight = self._entries(slot.module, slot.tensor).movedim(slot.dim, 0)  # a line a channel that is read
        alone = move.into_bias
        if keeps_constants(layer):
            alone = torch.cat([alone, move.into_carrier])
        elif len(move.into_carrier):
            constant = values[move.carrier]
            ratio = torch.where(constant == 0, 0.0, values[move.into_carrier] / constant)
            lines = weight[positions[move.into_carrier]]  # (channels, copies, …)
            scaled = lines * ratio.to(lines).view(*ratio.shape, *[1] * (lines.dim() - 2))
            weight[positions[move.carrier]] += scaled.sum(0)
        if values[alone].any():
            lines = weight[positions[alone].flatten()]  # (channels × copies, written, kernel …)
            sums = lines.reshape(*lines.shape[:2], -1).sum(2)
            self._add_constants(slot.module, values[alone].flatten().to(sums) @ sums)

    def _add_constants(self, path: str, added: Tensor) -> None:
        """Add to what a layer writes: in the norm that follows, else in its bias."""
        layer = self.model.get_submodule(path)
        norm = self.norms.get(path)
        mean = None if norm is None else self.model.get_submodule(norm).running_mean
        if mean is not None:
            mean.sub_(added)
        elif layer.bias is not None:
            layer.bias.add_(added)
        else:
            layer.bias = nn.Parameter(added)
            self._list_bias(path)

    def _list_bias(self, path: str) -> None:
        """Let a new bias follow the channels that its layer writes."""
        for width in self.widths.values():
            for slot in width.slots:
                if (slot.module, slot.tensor, slot.dim) == (path, "weight", 0):
                    bias = replace(slot, tensor="bias", role="per_channel")
                    width.slots = (*width.slots, bias)


def plan_move(model: nn.Module, unwritten: Tensor, readings: list[Reading]) -> Move:
    """Decide where the constants of unwritten channels go; those that vary for some reader stay.

    What no padding reader tells from zero goes into biases. The others go into the one of them whose constant
    is the largest where it is smallest, so that the ratios to it are well defined.
    """
    is_constant, affects_padding = unwritten.clone(), torch.zeros_like(unwritten)
    padding = [r.values for r in readings if not keeps_constants(model.get_submodule(r.slot.module))]
    for reading in readings:
        is_constant &= ~reading.values.isnan().any(1)
    for values in padding:
        affects_padding |= (values != 0).any(1)
    into_bias, rest = (
        (is_constant & mask).nonzero().flatten() for mask in (~affects_padding, affects_padding)
    )
    # A reader that finds zeros on all of them does not mind which one carries.
    magnitudes = [values[rest].abs().amin(1) for values in padding if values[rest].any()]
    if not magnitudes:
        return Move(into_bias, rest[:0])
    magnitude = torch.stack(magnitudes).amin(0)
    best = int(magnitude.argmax())
    if magnitude[best] == 0:
        return Move(into_bias, rest[:0])
    return Move(into_bias, rest[rest != rest[best]], int(rest[best]))


def keeps_constants(layer: nn.Module) -> bool:
    """Tell whether a layer makes constant maps of constant maps; beyond a border of zeros they are none."""
    if is_stock(layer, CONVOLUTIONS):
        if layer.padding_mode != "zeros":
            return True
        if layer.padding == "same":
            return all(size == 1 for size in layer.kernel_size)
        return layer.padding == "valid" or not any(layer.padding)
    return is_stock(layer, (nn.Linear.forward,))
