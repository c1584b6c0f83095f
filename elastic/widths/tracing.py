"""Tracing a model and carrying channel axes through it; nothing is computed, no memory is touched."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from elastic.errors import StructureError
from elastic.widths.operations import LAYER, fixed, flat, getitem, rule_for, split, value
from elastic.widths.parameters import ChannelParametrization, get_original
from elastic.widths.union import Axis, ChannelUnion

Role = Literal["out", "in", "per_channel", "depthwise"]
Recorded = dict[tuple[str, str, int], tuple[Role, Axis]]  # (module, tensor, dim) -> what lies there
BATCH_NORM = nn.modules.batchnorm._BatchNorm
MODE = "_mode"  # where a traced network holds its own


def make_meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model without its data: every tensor on the meta device.

    It is asked for shapes only: torch's own batch norms, which are slow there, keep them and do no more.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise StructureError(
                "a lazy layer has no shape yet: run the model once, then discover its widths"
            )
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    plain = (held for module in model.modules() for held in vars(module).values())
    for tensor in (*model.buffers(), *(held for held in plain if isinstance(held, Tensor))):
        memo[id(tensor)] = tensor.to("meta")
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        if isinstance(module, BATCH_NORM) and type(module).__module__.startswith("torch.nn."):
            module.forward = torch.empty_like  # type: ignore[method-assign]
    return twin


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # or buffers in arithmetic would become constants


def trace(model: nn.Module) -> fx.GraphModule:
    """The model as torch.fx has it, with the model's own layers.

    Raises:
        StructureError: torch.fx cannot trace it.
    """
    try:
        return fx.GraphModule(model, _Tracer().trace(model))
    except Exception as error:
        raise StructureError(
            f"{type(model).__name__} cannot be traced by torch.fx ({_first(error)}); let torch.where choose "
            "by data, and hide a function that chooses by shapes behind torch.fx.wrap"
        ) from error


def get_layer(traced: nn.Module, node: fx.Node) -> nn.Module | None:
    """The layer that a node calls, if it calls one."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def get_operation_name(node: fx.Node) -> str:
    """The name of the function, the method or the layer that a node calls: `relu_`, `add`, `stage1.0`."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Each module is in the mode it was in afterwards, whatever happens: some may be frozen."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Mode(nn.Module):
    """Says whether it is in training: what `self.training` was before torch.fx made a constant of it."""

    def forward(self) -> bool:
        return self.training


def sync_traced(traced: fx.GraphModule, model: nn.Module, training: bool) -> None:
    """Give what `trace_modes` made of a model a mode, and the model's buffers, which moving it replaces."""
    if isinstance(mode := traced._modules.get(MODE), Mode):
        mode.training = training
    for node in traced.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        held = model.get_submodule(path)._buffers
        if name in held:
            traced.get_submodule(path)._buffers[name] = held[name]


def trace_both_modes(model: nn.Module) -> fx.GraphModule:
    """The same, to be trained and evaluated: flags like training=self.training follow its mode.

    Raises:
        StructureError: torch.fx cannot trace it, or it is another network in training than in evaluation.
    """
    with preserve_modes(model):
        training, traced = (trace(model.train(mode)) for mode in (True, False))
    traced.training = model.training
    if traced.code == training.code:
        return traced
    ones, others = list(training.graph.nodes), list(traced.graph.nodes)
    traced.add_submodule(MODE, Mode().train(model.training))
    with traced.graph.inserting_before(others[0]):
        flag = traced.graph.call_module(MODE)
    try:
        for one, other in zip(ones, others, strict=True):
            if one.target != other.target:
                raise ValueError(f"{_describe(one)} there is {_describe(other)} here")
            other.args, other.kwargs = (
                _either(one.args, other.args, flag),
                _either(one.kwargs, other.kwargs, flag),
            )
    except ValueError as error:
        raise StructureError(
            f"{type(model).__name__} is another network in training than in evaluation ({error}): only flags "
            "like F.dropout(x, training=self.training) may differ"
        ) from error
    traced.recompile()
    return traced


def _either(one: Any, other: Any, flag: fx.Node) -> Any:
    """Arguments in evaluation, but for what is true in training and false here: that is as the flag says."""
    if isinstance(other, tuple | list):
        return type(other)(_either(a, b, flag) for a, b in zip(one, other, strict=True))
    if isinstance(other, dict):
        return {key: _either(one[key], value, flag) for key, value in other.items()}
    if one is True and other is False:
        return flag
    if one != other and str(one) != str(other):  # nodes of two graphs agree by name
        raise ValueError(f"{one} there is {other} here")
    return other


def find_following_norms(model: nn.Module) -> dict[str, str]:
    """For each layer that one batch norm and nothing else reads, that norm's path."""
    graph = trace(make_meta_copy(model)).graph
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
        elements: ChannelUnion,
        slots: Recorded,
    ) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.extra_traceback = False  # errors of one line
        self.graph_module = graph
        self.shared: dict[tuple[int, int], Axis] = {}
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
        untracked = (None,) * out.dim() if isinstance(out, Tensor) else None
        if node.op == "placeholder":
            return untracked
        if node.op == "output":
            for n in node.all_input_nodes:
                for axis in flat(n.meta["axes"]):
                    self.elements.fix(axis, "it is the model's output")
            return None
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            if not isinstance(out, Tensor):
                return None
            sizes = enumerate(out.shape)
            return tuple(self.new(owner, name, "per_channel", d) if n > 1 else None for d, n in sizes)
        if not any(n.meta["axes"] is not None for n in node.all_input_nodes):
            return untracked
        return self._by_rule(node, out)

    def _by_rule(self, node: fx.Node, out: Any) -> Any:
        """The operation's rule, unless it has none or is used in a way that its rule does not know."""
        rule = rule_for(self.layer(node), self.operation(node))
        if not isinstance(out, Tensor) and rule not in (split, getitem):
            if isinstance(out, (int, torch.Size, torch.device, torch.dtype)):
                return None
            return fixed(self, node)
        try:
            axes = rule(self, node)
            if isinstance(out, Tensor):
                assert len(axes) == out.dim()
                assert all(a is None or len(a) == n for a, n in zip(axes, out.shape, strict=True))
            return axes
        except StructureError:
            raise
        except Exception:
            return fixed(self, node)

    # What the rules ask for.

    def layer(self, node: fx.Node) -> Any:
        return self.fetch_attr(str(node.target)) if node.op == "call_module" else None

    def operation(self, node: fx.Node) -> str:
        target: Any = node.target
        return (target if isinstance(target, str) else target.__name__).strip("_")

    def new(self, module: str, tensor: str, role: Role, dim: int = 0) -> Axis | None:
        """Channels that begin here: those that a layer writes, or that a parameter of its own holds."""
        held = self._held(module, tensor)
        return self.slot(module, tensor, dim, role, self.elements.new(held.shape[dim]))

    def slot(self, module: str, tensor: str, dim: int, role: Role, axis: Axis | None) -> Axis | None:
        """Record that channels lie on a tensor's dimension."""
        held = self._held(module, tensor)
        if axis is None or (held is None and tensor != LAYER):
            return None
        known = self.slots.setdefault((module, tensor, dim), (role, axis))[1]
        self.elements.unite(known, axis)
        if held is not None:  # one parameter may serve several layers
            self.elements.unite(self.shared.setdefault((id(held), dim), known), known)
            self._refuse_foreign(module, tensor, known)
        return known

    def _held(self, module: str, tensor: str) -> Any:
        owner = self.fetch_attr(module) if module else self.graph_module
        return get_original(owner, tensor) if tensor != LAYER else None

    def _refuse_foreign(self, module: str, tensor: str, axis: Axis) -> None:
        owner = self.fetch_attr(module) if module else self.graph_module
        if parametrize.is_parametrized(owner, tensor):
            for p in owner.parametrizations[tensor]:  # type: ignore[index,union-attr]
                if not isinstance(p, ChannelParametrization):
                    self.elements.fix(axis, f"{module}.{tensor} is parametrized by {type(p).__name__}")

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
        if len(node.args) == 2 and isinstance(value(node.args[1]), torch.Size):
            return isinstance(node.args[1], fx.Node)
        if isinstance(self.layer(node), nn.Unflatten) or self.operation(node) == "unflatten":
            return False
        first: Any = node.args[1]
        sizes = first if isinstance(first, (tuple, list)) else node.args[1:]
        return isinstance(sizes[dim], fx.Node) or bool(sizes[dim] == -1)


def _describe(node: fx.Node) -> str:
    """The operation as a user would find it: `view(-1, 400) in features.6`."""
    if node.op == "call_module":
        owner: Any = node.graph.owning_module
        return f"{node.target} ({type(owner.get_submodule(str(node.target))).__name__})"
    stack = node.meta.get("nn_module_stack") or {}
    where = next(reversed(list(stack)), "") or "the model's forward"
    numbers = [a for arg in node.args[1:] for a in (arg if isinstance(arg, (tuple, list)) else [arg])]
    shown = ", ".join("…" if isinstance(a, fx.Node) else str(a) for a in numbers)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return f"{name}({shown}) in {where}"
