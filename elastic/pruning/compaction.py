"""Compact a network: gates folded, dead channels removed, a plain module out, equal in output.

A channel is dead where nothing reads it, or where nothing writes it. What reads a channel of the second kind
takes over its constant: in the norm that follows or in a bias where that is exact, else (behind zero padding,
a constant map does not sum to a constant) in one channel that stays and carries the constants of all.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from elastic.pruning.constants import (
    Move,
    Reading,
    keeps_constants,
    observe_constants,
    observe_zeros_in_training,
    plan_move,
    read_constants,
)
from elastic.pruning.dead import find_unread, find_unwritten, list_kept
from elastic.pruning.folding import fold_gates
from elastic.surgery.layers import list_depthwise
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import find_widths
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.mode import set_mode
from elastic.widths.tracing import find_following_norms
from elastic.widths.width import Width, Widths

TINY = torch.finfo(torch.float32).tiny  # smaller numbers are denormal, and many times slower on CPUs
BELOW_TINY = TINY * (1 - torch.finfo(torch.float32).eps)


@torch.no_grad()
def compact(model: nn.Module, example: Example) -> nn.Module:
    """Make a plain copy of a (gated) model without its dead channels, in evaluation mode.

    Args:
        example: an input, batch first, or several; their shapes and types matter.
    """
    plain = set_mode(fold_gates(model))
    is_final = False
    while not is_final:
        flush_denormals(plain)
        depthwise = list_depthwise(plain)
        widths = find_widths(plain, *list_inputs(example))
        reindex(plain, widths, Emptying(plain, widths, example).empty_dead_channels())
        # Nothing more is dead by these widths. But a grouped convolution with one channel left in each group
        # is a depthwise one, whose channels can go one by one, and a depthwise one with one left is not.
        is_final = list_depthwise(plain) == depthwise
    flush_denormals(plain)  # sums of constants
    return plain


def flush_denormals(model: nn.Module) -> None:
    """Set to zero what is so small that CPUs take many times as long for it."""
    for tensor in model.parameters():
        tensor.copy_(nn.functional.hardshrink(tensor, BELOW_TINY))


@dataclass
class Emptying:
    """Empty the dead channels of a plain model: move what they still tell, set to zero what reads them.

    An emptied channel may leave another one unread or unwritten, so the widths on the same layers are looked
    at again, until nothing changes. No step changes the function, so that constants are observed once.
    """

    model: nn.Module
    widths: Widths
    example: Example
    dead: dict[str, Tensor] = field(default_factory=dict)  # by width: (channels,)

    def empty_dead_channels(self) -> dict[str, Tensor]:
        """Empty all dead channels; give, for each width that has any, those to keep."""
        # A norm that takes statistics over channels together feels the dead ones too.
        names = [name for name, width in self.widths.items() if width.mixed is None]
        self.dead = {name: torch.zeros(self.widths[name].size, dtype=torch.bool) for name in names}
        pending = dict.fromkeys(names)  # a queue without repetitions
        while pending:
            del pending[name := next(iter(pending))]
            if self._empty(self.widths[name]):
                pending |= dict.fromkeys(self._neighbours[name])
        return list_kept(self.dead)

    def _empty(self, width: Width) -> bool:
        """Empty the channels of one width that are dead by now; tell whether there were any new ones."""
        dead = self.dead[width.name]
        unread = find_unread(self.widths, width, self._get_tensor) & ~dead
        self._clear(width, "out", unread)
        dead |= unread
        unwritten = find_unwritten(self.widths, width, self._get_tensor) & ~dead
        moved = self._move_constants(width, unwritten) if unwritten.any() else unwritten
        self._clear(width, "in", moved)
        dead |= moved
        return bool((unread | moved).any())

    def _move_constants(self, width: Width, unwritten: Tensor) -> Tensor:
        """Move what the readers see of unwritten channels; give the channels for which that could be done."""
        moved = torch.zeros_like(unwritten)
        if not self._has_tied_readers(width):
            readings = read_constants(self.widths, width, self._constants)
            move = plan_move(self.model, unwritten, readings)
            for reading in readings:
                self._take_over(width, reading, move)
            moved[torch.cat([move.into_bias, move.into_carrier])] = True
        return moved

    def _take_over(self, width: Width, reading: Reading, move: Move) -> None:
        """Let one reader take over what moved channels tell it."""
        slot, values = reading
        positions = self.widths.positions(slot, width.name)  # (channels, copies)
        columns = self._get_tensor(slot.module, slot.tensor).movedim(slot.dim, 0)
        summed = move.into_bias
        if keeps_constants(self.model.get_submodule(slot.module)):
            summed = torch.cat([summed, move.into_carrier])
        elif len(move.into_carrier):
            carried = values[move.carrier]
            ratio = torch.where(carried == 0, 0.0, values[move.into_carrier] / carried)
            added = columns[positions[move.into_carrier]]  # (channels, copies, written, kernel …)
            added = added * ratio.to(added).view(*ratio.shape, *[1] * (added.dim() - 2))
            columns[positions[move.carrier]] += added.sum(0)
        if values[summed].any():
            added = columns[positions[summed].flatten()]  # (channels × copies, written, kernel …)
            added = added.reshape(*added.shape[:2], -1).sum(2)
            self._add_constants(slot.module, values[summed].flatten().to(added) @ added)

    def _add_constants(self, path: str, added: Tensor) -> None:
        """Add constants to what a layer writes: in the norm that follows, else in its bias."""
        mean = self._get_tensor(self._norms[path], "running_mean") if path in self._norms else None
        layer = self.model.get_submodule(path)
        if mean is not None:
            mean.sub_(added)
        elif layer.bias is not None:
            self._get_tensor(path, "bias").add_(added)
        else:
            layer.bias = nn.Parameter(added)
            for width in self.widths.values():
                self._attach_bias(width, path)

    def _attach_bias(self, width: Width, path: str) -> None:
        """Let a layer's new bias follow the channels that the layer writes."""
        for slot in width.slots:
            if (slot.module, slot.tensor, slot.dim) == (path, "weight", 0):
                width.slots = (*width.slots, replace(slot, tensor="bias", role="per_channel"))

    def _clear(self, width: Width, role: Literal["out", "in"], channels: Tensor) -> None:
        """Set to zero what writes ("out"), or what reads ("in"), the channels."""
        for slot in width.slots_with(role) if channels.any() else ():
            weight = self._get_tensor(slot.module, slot.tensor)
            positions = self.widths.positions(slot, width.name)[channels].flatten()
            weight.index_fill_(slot.dim, positions.to(weight.device), 0)

    def _get_tensor(self, module: str, tensor: str) -> Tensor:
        value: Tensor = getattr(self.model.get_submodule(module), tensor)
        return value if value is None else value.detach()

    def _has_tied_readers(self, width: Width) -> bool:
        """Tell whether readers share a weight: it cannot take over what each of them sees."""
        weights = [self._get_tensor(slot.module, slot.tensor) for slot in width.slots_with("in")]
        return len({weight.data_ptr() for weight in weights}) < len(weights)

    @cached_property
    def _constants(self) -> dict[str, Tensor]:
        readers = {slot.module for name in self.dead for slot in self.widths[name].slots_with("in")}
        constants = observe_constants(self.model, readers, self.example)
        if remaining := readers - constants.keys():  # auxiliary heads, which are called in training alone
            constants |= observe_zeros_in_training(self.model, remaining, self.example)
        return constants

    @cached_property
    def _norms(self) -> dict[str, str]:
        return find_following_norms(self.model, *list_inputs(self.example))

    @cached_property
    def _neighbours(self) -> dict[str, dict[str, None]]:
        """List, for each width, those that lie on the same layers, itself included."""
        by_layer: dict[str, list[str]] = defaultdict(list)
        for name in self.dead:
            slots = self.widths[name].slots
            for layer in dict.fromkeys(slot.module for slot in slots if slot.role in ("in", "out")):
                by_layer[layer].append(name)
        neighbours: dict[str, dict[str, None]] = defaultdict(dict)
        for names in by_layer.values():
            for name in names:
                neighbours[name] |= dict.fromkeys(names)
        return neighbours
