"""Widths: the channel axes of any CNN, discovered from the model and an example input.

The model is traced with torch.fx on the meta device (no arithmetic, no memory), in training and in
evaluation mode; channel axes that meet are united (`elastic.axes`, `elastic.rules`). What remains apart is
a `Width`: a number of channels that can change, with every tensor dimension that must follow.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.widths.tracing import Recorded, Role, Tracker, make_meta_copy, trace
from elastic.widths.union import Axis, ChannelUnion


@dataclass(frozen=True)
class Segment:
    """A run of positions in a tensor dimension: a width's channels in order, each `repeat` times.

    `width` is None for positions that never change; `repeat` is then their number.
    """

    width: str | None
    repeat: int


@dataclass(frozen=True)
class Slot:
    """One tensor dimension on which channels lie.

    `role` is "out" where a layer writes its channels (weight dim 0), "in" where it reads them (weight
    dim 1), "per_channel" for what is merely carried a channel (bias, norms), and "depthwise" where the layer
    also keeps as many groups as channels (depthwise convolution, group norm of one channel a group). A
    `tensor` of "" stands for a layer without tensors whose attributes count channels.
    """

    module: str
    tensor: str
    dim: int
    role: Role
    layout: tuple[Segment, ...]


@dataclass
class Width:
    """A channel axis: the set of tensor dimensions that must agree on their channels.

    It is named after the first layer that writes it. `mixed` says which norm, if any, takes statistics
    over its channels together, so that even a channel of zeros is felt by the others.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    mixed: str | None = None

    def slots_with(self, role: Role) -> list[Slot]:
        return [slot for slot in self.slots if slot.role == role]


@dataclass
class Widths(Mapping[str, Width]):
    """The widths of one model by name; `fixed` says why each other written axis cannot change.

    `example` holds the inputs it was traced with, without data.
    """

    widths: dict[str, Width]
    fixed: dict[str, str] = field(default_factory=dict)
    example: tuple[Tensor, ...] = field(default=(), compare=False)

    def __getitem__(self, name: str) -> Width:
        if name in self.widths:
            return self.widths[name]
        why = self.fixed.get(name, f"there is none; the model has {', '.join(self.widths)}")
        raise StructureError(f"width '{name}' cannot change: {why}")

    def __contains__(self, name: object) -> bool:
        return name in self.widths

    def __iter__(self) -> Iterator[str]:
        return iter(self.widths)

    def __len__(self) -> int:
        return len(self.widths)

    def get(self, name: str, default: Any = None) -> Any:
        return self.widths.get(name, default)

    def sizes(self) -> dict[str, int]:
        """The architecture: channels of every width. With the initial model it says everything."""
        return {name: width.size for name, width in self.widths.items()}

    def extents(self, slot: Slot) -> list[int]:
        """Positions that each segment of the slot takes now."""
        return [s.repeat * (self.widths[s.width].size if s.width else 1) for s in slot.layout]

    def positions(self, slot: Slot, width: str) -> Tensor:
        """Where the width's channels lie along the slot's dimension: (channels, copies)."""
        found, start = [], 0
        for segment, extent in zip(slot.layout, self.extents(slot), strict=True):
            if segment.width == width:
                found.append(torch.arange(start, start + extent).view(-1, segment.repeat))
            start += extent
        return torch.cat(found, dim=1)


def discover(model: nn.Module, *example: Tensor) -> Widths:
    """Find the widths of a model.

    Args:
        model: any CNN that torch.fx can trace; it is not changed and not run.
        example: its inputs, batch first; only their shapes and types matter.

    Raises:
        StructureError: the model cannot be traced, or none of its channel axes can change.
    """
    widths = find_widths(model, *example)
    if not widths:
        why = "; ".join(f"{name}: {reason}" for name, reason in widths.fixed.items())
        raise StructureError(f"no width of this model can change ({why or 'it has no layer with channels'})")
    return widths


def find_widths(model: nn.Module, *example: Tensor) -> Widths:
    """`discover`, for code that can live with a model that has no width left."""
    elements = ChannelUnion()
    slots: Recorded = {}
    twin = make_meta_copy(model)
    # Two samples, so that batch norm in training mode has something to average; sizes stay distinct.
    inputs = [x.new_empty((max(2, len(x)), *x.shape[1:]), device="meta") for x in example]
    traced = {graph.code: graph for graph in (trace(twin.train(mode)) for mode in (True, False))}
    for graph in traced.values():  # one, where both modes do the same
        with torch.no_grad():
            Tracker(graph, elements, slots).run(*inputs)
    found = _collect(elements, slots)
    found.example = tuple(inputs)
    return found


# --- from elements to widths ----------------------------------------------------------------------


def _collect(elements: ChannelUnion, slots: Recorded) -> Widths:
    """Gather elements that lie on the same slots, equally often, into widths, and check their order."""
    axes = {key: elements.roots(axis) for key, (_, axis) in slots.items()}
    fixed, mixed = elements.reasons(elements.fixed), elements.reasons(elements.mixed)
    tied = set(elements.roots(np.array(sorted(elements.tied), dtype=np.int64)).tolist())
    lies_on: dict[int, list[tuple[Any, int]]] = defaultdict(list)
    for key, axis in axes.items():
        for element, times in Counter(axis.tolist()).items():
            lies_on[element].append((key, times))

    members: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    seen: set[int] = set()
    for (module, tensor, dim), (role, _) in slots.items():
        if role != "out":
            continue
        groups: dict[Any, list[int]] = defaultdict(list)
        for element in dict.fromkeys(axes[module, tensor, dim].tolist()):
            if element not in seen:
                groups[tuple(lies_on[element]), element in fixed].append(element)
        for part, group in enumerate(groups.values()):
            name = module if not part else f"{module}:{part}"
            seen.update(group)
            members[name] = group
            if group[0] in fixed:
                reasons[name] = fixed[group[0]]
            elif len(group) == 1 and group[0] in tied:
                reasons[name] = "splits and shuffles tie all of its channels together"

    while True:  # fixing one width can only simplify the others' layouts
        free = {n: group for n, group in members.items() if n not in reasons}
        layouts = {key: _layout(axis, free) for key, axis in axes.items()}
        broken = {n: f"its channels are interleaved with others' in {k[0]}.{k[1]}"
                  for k, found in layouts.items() if isinstance(found, set) for n in found}  # fmt: skip
        if not broken:
            break
        reasons |= broken

    widths = {}
    for name, group in free.items():
        lying = tuple(
            Slot(*key, slots[key][0], layout)
            for key, layout in layouts.items()
            if not isinstance(layout, set) and any(segment.width == name for segment in layout)
        )
        widths[name] = Width(name, len(group), lying, next((mixed[e] for e in group if e in mixed), None))
    return Widths(widths, reasons)


def _layout(axis: Axis, members: Mapping[str, Sequence[int]]) -> tuple[Segment, ...] | set[str]:
    """Read an axis as segments, or say which widths lie on it in an order that cannot be kept."""
    owner = {element: (name, i) for name, group in members.items() for i, element in enumerate(group)}
    segments: list[Segment] = []
    at = 0
    while at < len(axis):
        name, unit = owner.get(int(axis[at]), (None, 0))
        if name is None:
            end = at + 1
            while end < len(axis) and int(axis[end]) not in owner:
                end += 1
            segments.append(Segment(None, end - at))
        else:
            group = members[name]
            repeat = next((i for i, e in enumerate(axis[at:]) if e != group[0]), len(axis) - at)
            end = at + repeat * len(group)
            if unit != 0 or not np.array_equal(axis[at:end], np.repeat(group, repeat)):
                return {n for e in axis.tolist() if (n := owner.get(e, (None,))[0]) is not None}
            segments.append(Segment(name, repeat))
        at = end
    return tuple(segments)
