"""Carry channel axes through a traced model; nothing is computed, no memory is touched."""

from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.utils import parametrize

from elastic.errors import StructureError
from elastic.widths.attributes import UsedAttributes, get_key
from elastic.widths.computed import CONSTANT
from elastic.widths.hooks import watch_hooks
from elastic.widths.operations import NEEDS_NO_TENSOR, READS_COUNTS, TABLE, NotFollowed, Role, Rule, Tracked
from elastic.widths.operations.counts import count_node, find_multiple, list_counts
from elastic.widths.operations.interface import (
    SIZE,
    Layer,
    Place,
    get_input,
    is_stored,
    list_axes,
    list_tensors,
)
from elastic.widths.parameters import (
    find_constraint,
    find_spectral_norm,
    find_weight_norm,
    get_original,
    list_foreign,
)
from elastic.widths.stock import Records, unite_attributes
from elastic.widths.tracing import describe_node
from elastic.widths.tracing.changing import find_written
from elastic.widths.tracing.expecting import changes_tensor, is_checked_alone
from elastic.widths.tracing.graph import shorten
from elastic.widths.tracing.meta import compute_without_data
from elastic.widths.tracing.sizes import SizeAttribute
from elastic.widths.union import Axis, ChannelUnion

# Values that hold no channels, though they may count them.
PLAIN = (int, float, torch.Size, torch.device, torch.dtype)


class AxisTracker:
    """Run a traced model on meta tensors and carry every value's channel axes along: see `Tracker`."""

    def __init__(
        self,
        graph: fx.Graph,
        model: nn.Module,
        elements: ChannelUnion,
        records: Records,
        kept_groups: Container[fx.Node] = (),
    ) -> None:
        self.graph, self.model = graph, model
        self.kept_groups = kept_groups  # operations whose groups keep their number
        self.joined: dict[fx.Node, Axis] = {}  # what the others work on
        self.layers = dict(model.named_modules())
        self.elements, self.records = elements, records
        self._attributes = UsedAttributes(elements, records, graph.computed_sizes)  # type: ignore[attr-defined]
        self._hooked_layers = watch_hooks(self.layers)
        self.written: set[str] = set()  # layers whose parameters the forward changes
        self.computed: set[str] = set()  # layers whose weights a norm computes, or a constraint
        self.divided: list[tuple[Axis, int, str]] = []  # axes that have to be multiples, and else are fixed
        self._recorded: list[Axis] = []  # what the rule of this node has recorded
        self._united_pairs: list[tuple[Axis, Axis]] = []  # what it has let agree
        self._aliases: dict[fx.Node, list[fx.Node]] = {}  # nodes that give one and the same tensor
        self._originals: dict[tuple[str, str], Tensor | None] = {}
        self._shared: dict[tuple[int, int], Axis] = {}  # by the identity of a tensor, and its dimension
        self._roles: dict[tuple[int, int], set[Role]] = {}  # likewise

    def run(self, *inputs: Tensor) -> None:
        """Run all nodes, and note of each its value and the value's axes.

        Last, let layers' own attributes count their own channels: those that are used as they are fix them.

        Raises:
            StructureError: the model does not run on these inputs, or a rule is at fault.
        """
        remaining = list(inputs)
        for node in self.graph.nodes:
            try:
                value = node.meta["value"] = self._compute(node, remaining)
            except Exception as error:  # the model's own code runs here: anything may come
                raise StructureError(
                    f"the model does not run on an example of shape {[tuple(x.shape) for x in inputs]}: "
                    f"{describe_node(node)}: {shorten(error)}"
                ) from error
            self._note_axes(node, value)
        unite_attributes(self.elements, self.records, self._find_module)
        self._attributes.fix_own_channels(self._find_module)

    def list_kept(self) -> list[Axis]:
        """List the axes of what the forward keeps in its modules and does not go on with."""
        nodes = [node for node in self.graph.nodes if not node.users]  # type: ignore[attr-defined]
        return [axis for node in nodes for axis in list_axes(node.meta["axes"])]

    def _note_axes(self, node: fx.Node, value: Any) -> None:
        written = find_written(node, self._find_layer, self._find_module)
        if written is not None:
            self.written.add(str(written.target).rpartition(".")[0])
        if _is_plain(value):
            node.meta["axes"], node.meta["counts"] = None, count_node(node, value)
            if (multiple := find_multiple(node)) is not None:
                node.meta[SIZE] = multiple
        else:
            node.meta["axes"] = self._find_axes(node, value)
        if self._hooked_layers and node.op == "call_module" and str(node.target) in self._hooked_layers:
            axes = [*list_axes(node.meta["axes"]), *self._list_input_axes(node)]
            self.fix(axes, node, "has a hook that may change them")
        if changes_tensor(node):
            self._update_aliases(node)

    def _update_aliases(self, node: fx.Node) -> None:
        """Let all nodes that give the tensor which a method has changed know its dimensions from now on."""
        source = get_input(node)
        aliases = self._aliases.setdefault(source, [source])
        self._aliases[node] = aliases
        aliases.append(node)
        for alias in aliases:
            alias.meta["value"], alias.meta["axes"] = node.meta["value"], node.meta["axes"]

    def _compute(self, node: fx.Node, inputs: list[Tensor]) -> Any:
        """Compute what a node gives; of what the model's forward makes, a tensor may have data yet."""
        if node.op == "placeholder":
            return _take_input(node, inputs)
        target: Any = node.target
        if node.op == "get_attr":
            path, _, name = target.rpartition(".")
            return getattr(self._find_module(path), name)
        args, kwargs = map_arg((node.args, dict(node.kwargs)), _get_value)
        if node.op == "output":
            return args[0]
        if changes_tensor(node) and isinstance(args[0], Tensor):
            get_input(node).meta["value"] = args[0].detach()  # of the shape before, which the rule asks for
        return compute_without_data(node, self._find_layer(node), args, kwargs)

    def _find_axes(self, node: fx.Node, value: Any) -> Tracked:
        if node.op == "output":
            for source in node.all_input_nodes:
                self.elements.fix_all(list_axes(source.meta["axes"]), "it is the model's output")
            return None
        if place := self._find_place(node):
            return self._begin_attribute(place, value)
        if node.op in ("placeholder", "get_attr"):
            return _untracked(value)
        try:
            return self._follow(node, value)
        finally:
            self._attributes.keep_others(node)

    def _follow(self, node: fx.Node, value: Any) -> Tracked:
        """Follow channels through an operation."""
        rule = TABLE.find(self._find_layer(node), node)
        if rule not in READS_COUNTS:
            self._fix_counts(node)
        if not list_tensors(node) and rule not in NEEDS_NO_TENSOR:
            return _untracked(value)
        try:
            return self._apply_rule(rule, node, value)
        except NotFollowed as error:
            self._fix_inputs(node, f"cannot be followed: it {error}")
            self._fix_counts(node)
            return _untracked(value)

    def _fix_counts(self, node: fx.Node) -> None:
        """Fix the channels that a node computes with as numbers."""
        for source in node.all_input_nodes:
            for count in list_counts(source) if "counts" in source.meta else ():
                self.fix(count.axes, node, "computes with the number of channels")

    def _find_module(self, path: str) -> nn.Module:
        """Find a module, at once where it has but one path."""
        return self.layers.get(path) or self.model.get_submodule(path)

    def _find_layer(self, node: fx.Node) -> nn.Module | None:
        """Find the layer that a node calls, if it calls one."""
        return self._find_module(str(node.target)) if node.op == "call_module" else None

    def _find_place(self, node: fx.Node) -> Place | None:
        """Find where a node's tensor is stored: an attribute's, or that of what parametrizes it."""
        if isinstance(self._find_layer(node), parametrize.ParametrizationList):
            module, _, name = str(node.target).rpartition("parametrizations.")
            return Place(module.rstrip("."), name)
        module, _, name = str(node.target).rpartition(".")
        if node.op != "get_attr" or name.startswith(CONSTANT):
            return None
        return Place(module, name)

    def _begin_attribute(self, place: Place, value: Any) -> Tracked:
        """Let channels begin on each dimension of a tensor that the model holds, but for those of size 1."""
        if not isinstance(value, Tensor):
            return None
        owner, ndim = self._find_module(place.module), value.dim()
        if isinstance(owner, nn.modules.conv._ConvNd) and place.tensor == "weight":
            ndim = 2  # beyond are those of a kernel
        sizes = enumerate(value.shape)
        return tuple(
            self.begin(*place, "per_channel", d) if size > 1 and d < ndim else None for d, size in sizes
        )

    def _apply_rule(self, rule: Rule | None, node: fx.Node, value: Any) -> Tracked:
        """Ask the operation's rule; without one, all that the node reads keeps its size."""
        if rule is None:
            self._fix_inputs(node, "cannot be followed")
            return _untracked(value)
        try:
            self._recorded, self._united_pairs = [], []
            axes = rule(self, node)
            _check(axes, value)
            self._fix_lost(node, axes)
        except StructureError:
            raise
        except Exception as error:
            name = getattr(rule, "__name__", repr(rule))
            raise StructureError(
                f"the rule {name} is at fault at {describe_node(node)}: "
                f"{type(error).__name__}: {shorten(error)}"
            ) from error
        return axes

    def _fix_lost(self, node: fx.Node, axes: Tracked) -> None:
        """Fix what a rule neither carries on nor records: nothing is known of what became of it."""
        followed = [*list_axes(axes), *self._recorded]
        own = set(map(id, followed))
        for pair in self._united_pairs:
            if not own.isdisjoint(map(id, pair)):
                own.update(map(id, pair))
        lost = [axis for axis in self._list_input_axes(node) if id(axis) not in own]
        if lost and not self.elements.includes(followed, lost):
            roots = self.elements.represent(np.concatenate([*followed, np.empty(0, np.int64)]))
            lost = [axis[~np.isin(self.elements.represent(axis), roots)] for axis in lost]
            self.fix(lost, node, "does not carry them on")

    def _fix_inputs(self, node: fx.Node, reason: str) -> None:
        self.fix(self._list_input_axes(node), node, reason)

    def _list_input_axes(self, node: fx.Node) -> list[Axis]:
        return [axis for source in list_tensors(node) for axis in list_axes(source.meta["axes"])]

    # What the rules ask for, see `Tracker`.

    def get_layer(self, node: fx.Node, kind: type[Layer]) -> Layer:
        layer = self._find_layer(node)
        if not isinstance(layer, kind):
            raise TypeError(f"it is for a {kind.__name__}")
        return layer

    def get_module(self, path: str) -> nn.Module:
        return self._find_module(path)

    def locate(self, tensor: fx.Node) -> Place:
        place = self._find_place(tensor)
        if place is None:
            raise NotFollowed("is given a tensor that is computed")
        return place

    def begin(self, module: str, tensor: str, role: Role, dim: int = 0) -> Axis:
        original = self._fetch_original(module, tensor)
        if original is None:
            raise LookupError(f"{module} has no tensor {tensor}")
        axis = self.elements.new(original.shape[dim])
        self.record(module, tensor, dim, role, axis)
        return self.records[module, tensor, dim][1]

    def record(self, module: str, tensor: str, dim: int, role: Role, axis: Axis | None) -> None:
        original = self._fetch_original(module, tensor)
        if axis is None or (original is None and is_stored(tensor)):
            return
        role_before, first = self.records.get((module, tensor, dim), ("per_channel", axis))
        self.records[module, tensor, dim] = (role if role_before == "per_channel" else role_before), first
        self.elements.unite(first, axis)
        self._recorded.append(axis)
        if original is not None:  # one parameter may serve several layers
            self.elements.unite(self._shared.setdefault((id(original), dim), first), first)
            roles = self._roles.setdefault((id(original), dim), set())
            roles.add(role)
            if roles >= {"in", "out"}:
                self.elements.fix(first, f"{module}.{tensor} is both what writes them and what reads them")
            self._fix_foreign(module, tensor, dim, role, first)

    def follow_size(self, size: object, axis: Axis | None) -> bool:
        if not isinstance(size, SizeAttribute) or axis is None:
            return False
        view = self._attributes.find_view(size, axis)
        if view is None:
            return False
        # The attribute is copies / parts × size.
        copies, parts = view.factor.denominator, view.factor.numerator
        part = _list_repeated(axis, parts)
        part = self.elements.tie(axis, parts) if part is None else part
        recorded = list(self._recorded)
        self.record(*get_key(view.place), "count", np.repeat(part, copies))
        self._recorded = recorded  # it is counted, which does not say what became of it
        self._attributes.note_followed(size, view, axis)
        return True

    def drop(self, axes: Sequence[Axis | None]) -> None:
        self._recorded += [axis for axis in axes if axis is not None]

    def join(self, axis: Axis, groups: int, node: fx.Node, size: object = None) -> bool:
        if groups == 1 or node in self.kept_groups:
            return False
        if size is not None and not self.follow_size(size, axis.reshape(groups, -1)[:, 0]):
            return False
        self.elements.tie_parts(list(axis.reshape(groups, -1).T))  # the first of all, the second of all …
        self.joined[node] = axis
        return True

    def mix(self, axes: Sequence[Axis | None], node: fx.Node, reason: str) -> None:
        is_read = not is_checked_alone(node)
        for axis in axes:
            if axis is not None:
                if is_read:
                    self.elements.mix(axis, f"{describe_node(node)} {reason}")
                self._recorded.append(axis)

    def divide(self, axis: Axis, divisor: int, node: fx.Node, reason: str) -> None:
        self.divided.append((axis, divisor, f"{describe_node(node)} {reason}"))

    def is_mixed(self, axis: Axis) -> bool:
        return bool((self.elements.mixed.numbers[self.elements.represent(axis)] >= 0).all())

    def unite(self, first: Axis | None, second: Axis | None, node: fx.Node) -> None:
        if first is None or second is None:
            self.fix([first, second], node, "joins a part that never changes")
        else:
            self.elements.unite(first, second)
            self._united_pairs.append((first, second))

    def fix(self, axes: Sequence[Axis | None], node: fx.Node, reason: str) -> None:
        if any(axis is not None for axis in axes):
            self.elements.fix_all(axes, f"{describe_node(node)} {reason}")

    def _fetch_original(self, module: str, tensor: str) -> Tensor | None:
        """Fetch a tensor once: what is computed has to stay, for another one might get its identity."""
        place = (module, tensor)
        if place not in self._originals:
            owner = self._find_module(module)
            self._originals[place] = get_original(owner, tensor) if is_stored(tensor) else None
        return self._originals[place]

    def _fix_foreign(self, module: str, tensor: str, dim: int, role: Role, axis: Axis) -> None:
        """Fix what a hook computes, or a parametrization whose own tensors do not follow channels.

        Weight norm and spectral norm are followed: the largest singular value is that of all rows. So are
        constraints, such as max norm, along dimensions where surgery keeps within their bounds.
        """
        owner = self._find_module(module)
        if (norm := find_spectral_norm(owner, tensor)) is not None:
            self.computed.add(module)
            if dim == norm.dim:
                self.elements.mix(axis, f"spectral norm divides {module}.{tensor} by what all its rows tell")
        elif find_weight_norm(owner, tensor) is not None:
            self.computed.add(module)
        elif (constraint := find_constraint(owner, tensor)) is not None:
            self.computed.add(module)
            if not constraint.allows(dim, role == "in"):
                name = type(constraint.project).__name__
                self.elements.fix(
                    axis, f"{name} would change {module}.{tensor}, were its size another: remove it first"
                )
        elif tensor in vars(owner) and owner._forward_pre_hooks:
            self.elements.fix(axis, f"{module}.{tensor} is computed by a hook: remove it first")
        for parametrization in list_foreign(owner, tensor):
            name = type(parametrization).__name__
            self.elements.fix(axis, f"{module}.{tensor} is parametrized by {name}: remove it first")


def _take_input(node: fx.Node, inputs: list[Tensor]) -> Any:
    """Take the next inputs for a placeholder, or what it stands for without one."""
    if not inputs and not node.args:
        raise TypeError("there is no input for it")
    return inputs.pop(0) if inputs else node.args[0]


def _get_value(node: fx.Node) -> Any:
    return node.meta["value"]


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (
        isinstance(value, tuple | list) and all(isinstance(part, PLAIN) for part in value)
    )


def _list_repeated(axis: Axis, times: int) -> Axis | None:
    """List the channels of an axis, in order, that holds each of them so many times; None if it does not."""
    _, places, counts = np.unique(axis, return_index=True, return_counts=True)
    return axis[np.sort(places)] if (counts == times).all() else None


def _untracked(value: Any) -> Tracked:
    return (None,) * value.dim() if isinstance(value, Tensor) else None


def _check(axes: Tracked, value: Any) -> None:
    """Hold a rule to the shape of what the node gives."""
    if not isinstance(value, Tensor):
        return
    sizes = [None if axis is None else len(axis) for axis in axes or ()]
    if len(sizes) != value.dim() or any(n not in (None, m) for n, m in zip(sizes, value.shape, strict=True)):
        raise AssertionError(f"it gives axes of {sizes} channels for a tensor of shape {tuple(value.shape)}")
