"""Describe what may change: widths, and the tensor dimensions on which their channels lie."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic.errors import StructureError
from elastic.widths.operations.interface import Role


@dataclass(frozen=True)
class Segment:
    """Hold a run of positions in a tensor dimension: a width's channels in order, each `repeat` times.

    `width` is None for positions that never change; `repeat` is then their number.
    """

    width: str | None
    repeat: int


@dataclass(frozen=True)
class Slot:
    """Name one tensor dimension on which channels lie.

    `role` is "out" where a layer writes its channels (weight dim 0, or 1 of a transposed convolution or an
    embedding), "in" where it reads them (the other one), "per_channel" for what is merely carried a channel
    (bias, norms), and "depthwise" where the number of the layer's groups follows, too (depthwise convolution,
    group norm). A `tensor` of "" stands for a layer without tensors whose attributes count channels.
    """

    module: str
    tensor: str
    dim: int
    role: Role
    layout: tuple[Segment, ...]

    @property
    def is_transposed(self) -> bool:
        """Tell whether a weight lies the other way round: (in, out, …)."""
        return (self.dim, self.role) in ((0, "in"), (1, "out"))


@dataclass
class Width:
    """Hold a channel axis: the set of tensor dimensions that must agree on their channels.

    It is named after the first layer that writes it. `mixed` says which norm, if any, takes statistics
    over its channels together, so that even a channel of zeros is felt by the others.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    mixed: str | None = None

    def slots_with(self, role: Role) -> list[Slot]:
        """List the slots of a role."""
        return [slot for slot in self.slots if slot.role == role]


@dataclass
class Widths(Mapping[str, Width]):
    """Hold the widths of one model by name; `fixed` says why each other written axis cannot change.

    `example` holds the inputs it was traced with, without data; `untrained` the paths of modules that no
    gradient comes to: the forward calls them under `torch.no_grad()`, say, or detaches what they give;
    `written` those of layers whose parameters the forward itself changes, to bound or to mask them;
    `computed` those of layers whose weights torch's weight norm computes.
    """

    widths: dict[str, Width]
    fixed: dict[str, str] = field(default_factory=dict)
    example: tuple[Tensor, ...] = field(default=(), compare=False)
    untrained: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    computed: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Width:
        if not isinstance(name, str):
            raise StructureError(f"a width is named by a text, not by a {type(name).__name__}")
        if name in self.widths:
            return self.widths[name]
        reason = self.fixed.get(name, f"there is none; the model has {', '.join(self.widths)}")
        raise StructureError(f"width '{name}' cannot change: {reason}")

    def __contains__(self, name: object) -> bool:
        return name in self.widths

    def __iter__(self) -> Iterator[str]:
        return iter(self.widths)

    def __len__(self) -> int:
        return len(self.widths)

    def get(self, name: str, default: Any = None) -> Any:
        """Get a width, or the default where there is none that can change."""
        return self.widths.get(name, default)

    def sizes(self) -> dict[str, int]:
        """Give the architecture: channels of every width. With the initial model it says everything."""
        return {name: width.size for name, width in self.widths.items()}

    def extents(self, slot: Slot, sizes: Mapping[str, int] | None = None) -> list[int]:
        """Count the positions that each segment of a slot takes now, or where widths have other sizes."""

        def get_size(width: str) -> int:
            return self.widths[width].size if sizes is None else sizes[width]

        return [s.repeat * (get_size(s.width) if s.width else 1) for s in slot.layout]

    def positions(self, slot: Slot, width: str, sizes: Mapping[str, int] | None = None) -> Tensor:
        """Find where a width's channels lie along a slot's dimension: (channels, copies)."""
        return torch.from_numpy(self.locate(slot, width, sizes))

    def locate(self, slot: Slot, width: str, sizes: Mapping[str, int] | None = None) -> NDArray[np.int64]:
        """Find where the width's channels lie along a slot's dimension, as an array: (channels, copies).

        Args:
            sizes: those of all widths, where they are not the ones of now.
        """
        parts, start = [], 0
        for segment, extent in zip(slot.layout, self.extents(slot, sizes), strict=True):
            if segment.width == width:
                parts.append(np.arange(start, start + extent, dtype=np.int64).reshape(-1, segment.repeat))
            start += extent
        return np.concatenate(parts, axis=1)


def fix_widths(widths: Widths, reasons: dict[str, str]) -> None:
    """Take widths out of those that can change; where their channels lie, they count as constant."""
    if not reasons:
        return
    sizes = widths.sizes()
    for name, width in list(widths.items()):
        slots = tuple(_fix_slot(slot, reasons, sizes) for slot in width.slots)
        widths.widths[name] = Width(name, width.size, slots, width.mixed)
    for name, reason in reasons.items():
        del widths.widths[name]
        widths.fixed[name] = reason


def _fix_slot(slot: Slot, names: Container[str], sizes: dict[str, int]) -> Slot:
    if not any(segment.width in names for segment in slot.layout if segment.width is not None):
        return slot
    segments: list[Segment] = []
    for segment in slot.layout:
        if segment.width is not None and segment.width in names:
            segment = Segment(None, segment.repeat * sizes[segment.width])
        if segments and segment.width is None and segments[-1].width is None:  # constants side by side
            segment = Segment(None, segments.pop().repeat + segment.repeat)
        segments.append(segment)
    return Slot(slot.module, slot.tensor, slot.dim, slot.role, tuple(segments))
