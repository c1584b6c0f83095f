"""Hold a network as two graphs over the same layers: one is run in training, the other in evaluation."""

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, fx, nn

from elastic.errors import StructureError


class ByMode(fx.GraphModule):
    """Run one graph in training and another in evaluation, over the same layers.

    Args:
        training, evaluation: the network in either mode, with its own layers.

    Attributes:
        graph: the graph in evaluation.
        training_graph: the graph in training.

    Raises:
        StructureError: they have layers of different kinds under one name.
    """

    training_graph: fx.Graph | None = None

    def __init__(self, training: fx.GraphModule, evaluation: fx.GraphModule) -> None:
        super().__init__(evaluation, evaluation.graph)
        for node in training.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = _share(training, self, str(node.target))
        self.training_graph = training.graph
        self.training_graph.owning_module = self
        self.recompile()

    def recompile(self) -> Any:
        """Make the forward again, after a graph has been edited."""
        code = super().recompile()
        if self.training_graph is not None:
            kind: Any = type(self)  # torch.fx makes one for each network
            kind.forward = _choose(_compile(self.training_graph), kind.forward)
        return code

    def _split(self) -> list[fx.GraphModule]:
        return [fx.GraphModule(self, copy.deepcopy(graph)) for graph in reversed(list_graphs(self))]

    def __deepcopy__(self, memo: dict[int, Any]) -> "ByMode":
        memo[id(self)] = copied = ByMode(*(copy.deepcopy(traced, memo) for traced in self._split()))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return ByMode, tuple(self._split())


def list_graphs(traced: fx.GraphModule) -> list[fx.Graph]:
    """List a traced network's graphs: that in evaluation, and that in training if it is another one."""
    training = getattr(traced, "training_graph", None)
    return [traced.graph] if training is None else [traced.graph, training]


def _compile(graph: fx.Graph) -> Callable[..., Any]:
    code = graph.python_code(root_module="self")
    names = dict(code.globals)
    exec(compile(code.src, "<in training>", "exec"), names)
    forward: Callable[..., Any] = names["forward"]
    return forward


def _choose(train: Callable[..., Any], evaluate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(evaluate)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (train if self.training else evaluate)(self, *args, **kwargs)

    return forward


def _share(source: nn.Module, target: fx.GraphModule, path: str) -> str:
    """Give a network what another one has under a name; return the name under which it has it."""
    value = _find(source, path)
    present = _find(target, path)
    if isinstance(value, nn.Module):
        if present is None:
            target.add_submodule(path, value)
        elif type(present) is not type(value):
            raise StructureError(f"'{path}' is another layer in training than in evaluation")
        return path
    if present is not value:
        path = path if present is None else f"{path}_in_training"
        owner, _, name = path.rpartition(".")
        if _find(target, owner) is None:
            target.add_submodule(owner, nn.Module())
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            target.get_submodule(owner).register_buffer(name, value)
        else:
            setattr(target.get_submodule(owner), name, value)
    return path


def _find(model: nn.Module, path: str) -> Any:
    value: Any = model
    for name in path.split(".") if path else ():
        value = getattr(value, name, None)
    return value
