"""Tracing a model and carrying channel axes through it; nothing is computed, no memory is touched."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, fx, nn

from elastic.axes import Axis, Elements
from elastic.errors import StructureError
from elastic.rules import flat, getitem, rule_for, split

Role = Literal["out", "in", "along"]
Recorded = dict[tuple[str, str, int], tuple[Role, Axis]]  # (module, tensor, dim) -> what lies there
BATCH_NORM = nn.modules.batchnorm._BatchNorm


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
            f"{type(model).__name__} cannot be traced by torch.fx ({_first(error)}); keep data-dependent "
            "control flow in a submodule of its own, or wrap it with torch.fx.wrap"
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
        slots: Recorded,
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
        first: Any = node.args[1]
        sizes = first if isinstance(first, (tuple, list)) else node.args[1:]
        return isinstance(sizes[dim], fx.Node) or bool(sizes[dim] == -1)


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
