"""Widths: the channel axes of any CNN, discovered from the model and an example input.

The model is traced with torch.fx on the meta device (no arithmetic, no memory), in training and in
evaluation mode; channel axes that meet are united (`elastic.axes`, `elastic.rules`). What remains apart is
a `Width`: a number of channels that can change, with every tensor dimension that must follow.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from elastic.axes import Axis, Elements
from elastic.rules import Axes, flat, getitem, rule_for, split

Role = Literal["out", "in", "along"]


class StructureError(ValueError):
    """A model, or a change asked of it, that cannot be followed; says which part and what to do."""


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
    dim 1) and "along" for what is merely carried a channel (bias, norms, depthwise kernels).
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

    def role(self, role: Role) -> list[Slot]:
        return [slot for slot in self.slots if slot.role == role]


@dataclass
class Widths(Mapping[str, Width]):
    """The widths of one model by name; `fixed` says why each other written axis cannot change."""

    widths: dict[str, Width]
    fixed: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Width:
        if name in self.widths:
            return self.widths[name]
        why = self.fixed.get(name, f"there is none; the model has {', '.join(self.widths)}")
        raise StructureError(f"width '{name}' cannot change: {why}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.widths)

    def __len__(self) -> int:
        return len(self.widths)

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
    elements, slots = Elements(), dict[tuple[str, str, int], tuple[Role, Axis]]()
    twin = on_meta(model)
    # Two samples, so that batch norm in training mode has something to average; sizes stay distinct.
    inputs = [x.new_empty((max(2, len(x)), *x.shape[1:]), device="meta") for x in example]
    for training in (True, False):
        with torch.no_grad():
            Tracker(trace(twin.train(training)), elements, slots).run(*inputs)
    widths = _collect(elements, slots)
    if not widths:
        why = "; ".join(f"{name}: {reason}" for name, reason in widths.fixed.items())
        raise StructureError(f"no width of this model can change ({why or 'it has no layer with channels'})")
    return widths


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model without its data: every tensor on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)


def trace(model: nn.Module) -> fx.GraphModule:
    try:
        return fx.symbolic_trace(model)
    except Exception as error:
        raise StructureError(
            f"{type(model).__name__} cannot be traced by torch.fx ({_first(error)}); keep data-dependent control "
            "flow in a submodule of its own, or wrap it with torch.fx.wrap"
        ) from error


def norm_after(model: nn.Module) -> dict[str, str]:
    """For each layer that one batch norm and nothing else reads, that norm's path."""
    graph = trace(on_meta(model)).graph
    layers: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            layers[str(node.target)].append(node)
    found = {}
    for path, calls in layers.items():
        users = [user for call in calls for user in call.users]
        if len(calls) == len(users) == 1 and users[0].op == "call_module":
            norm = str(users[0].target)
            if len(layers[norm]) == 1 and isinstance(
                model.get_submodule(norm), nn.modules.batchnorm._BatchNorm
            ):
                found[path] = norm
    return found


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class Tracker(fx.Interpreter):
    """Runs a traced model on meta tensors and carries every value's channel axes along."""

    def __init__(
        self,
        graph: fx.GraphModule,
        elements: Elements,
        slots: dict[tuple[str, str, int], tuple[Role, Axis]],
    ) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.graph_module = graph
        self.elements, self.slots = elements, slots

    def run_node(self, node: fx.Node) -> Any:
        try:
            out = node.meta["value"] = super().run_node(node)
        except Exception as error:
            shapes = [tuple(n.meta["value"].shape) for n in self.graph.find_nodes(op="placeholder")]
            raise StructureError(
                f"the model does not run on an example of shape {shapes}: {_describe(node)}: {_first(error)}"
            ) from error
        node.meta["axes"] = self._axes(node, out)
        return out

    def _axes(self, node: fx.Node, out: Any) -> Any:
        if node.op == "placeholder":
            return tuple(None for _ in out.shape) if isinstance(out, Tensor) else None
        if node.op == "output":
            for n in node.all_input_nodes:
                for axis in flat(n.meta["axes"]):
                    self.elements.fix(axis, "it is the model's output")
            return None
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            if not isinstance(out, Tensor):
                return None
            return tuple(
                self.slot(owner, name, d, "along") if n > 1 else None for d, n in enumerate(out.shape)
            )
        if not any(n.meta["axes"] is not None for n in node.all_input_nodes):
            return None  # arithmetic on sizes
        rule = rule_for(self.layer(node) if node.op == "call_module" else None, self.operation(node))
        if not isinstance(out, Tensor) and rule not in (split, getitem):
            rule = rule_for(None, "")
            if self.operation(node) in ("size", "getattr", "dim", "numel", "ndim"):
                return None
        return rule(self, node)

    # What the rules ask for.

    def layer(self, node: fx.Node) -> Any:
        return self.fetch_attr(str(node.target)) if node.op == "call_module" else None

    def operation(self, node: fx.Node) -> str:
        target: Any = node.target
        return (target if isinstance(target, str) else target.__name__).strip("_")

    def slot(
        self, module: str, tensor: str, dim: int, role: Role, axis: Axis | None = None, /
    ) -> Axis | None:
        """Record that channels lie on a tensor's dimension (new ones, if they are written here)."""
        held = getattr(self.fetch_attr(module) if module else self.graph_module, tensor, None)
        if held is None or (axis is None and (role == "in" or tensor.startswith("running"))):
            return None
        if axis is None:
            axis = self.elements.new(held.shape[dim])
        if len(axis) != held.shape[dim]:
            raise StructureError(f"{module}.{tensor} has {held.shape[dim]} entries for {len(axis)} channels")
        known = self.slots.setdefault((module, tensor, dim), (role, axis))[1]
        self.elements.unite(known, axis)
        return known

    def constant(self, size: int, node: fx.Node) -> Axis:
        axis = self.elements.new(size)
        self.fix(node, [axis], "joins a part that never changes")
        return axis

    def meet(self, a: Axis | None, b: Axis | None, node: fx.Node) -> None:
        """Two axes that the node forces to agree; one that never changes fixes the other."""
        if a is None or b is None:
            self.fix(node, [a, b], "joins a part that never changes")
        else:
            self.elements.unite(a, b)

    def fix(self, node: fx.Node, axes: Sequence[Axis | None], why: str) -> None:
        for axis in axes:
            if axis is not None:
                self.elements.fix(axis, f"{_describe(node)} {why}")

    def follows(self, node: fx.Node, dim: int) -> bool:
        """Whether a reshaping node computes this size of its output from its input."""
        if self.operation(node) == "flatten" or isinstance(self.layer(node), nn.Flatten):
            return True
        if isinstance(self.layer(node), nn.Unflatten) or self.operation(node) == "unflatten":
            return False
        sizes = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return isinstance(sizes[dim], fx.Node) or sizes[dim] == -1  # type: ignore[index]


def _describe(node: fx.Node) -> str:
    """The operation as a user would find it: `view(-1, 400) in features.6`."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    where = next(reversed(list(stack)), "") or "the model's forward"
    numbers = [a for arg in node.args[1:] for a in (arg if isinstance(arg, (tuple, list)) else [arg])]
    shown = ", ".join("…" if isinstance(a, fx.Node) else str(a) for a in numbers)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return f"{name}({shown}) in {where}"


# --- from elements to widths ----------------------------------------------------------------------


def _collect(elements: Elements, slots: Mapping[tuple[str, str, int], tuple[Role, Axis]]) -> Widths:
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


__all__ = [
    "Axes",
    "Segment",
    "Slot",
    "StructureError",
    "Width",
    "Widths",
    "discover",
    "norm_after",
    "on_meta",
    "trace",
]
