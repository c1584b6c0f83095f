"""Join a network's graph in training with that in evaluation: into one, which follows its mode."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from elastic.widths.tracing.concrete import changes_tensor
from elastic.widths.tracing.graph import describe_node


class Mode(nn.Module):
    """Say whether it is in training: what `self.training` was before torch.fx made a constant of it."""

    def forward(self) -> bool:
        return self.training


class InTraining(nn.Module):
    """Do in training what a forward does to a value there alone; give the value back in evaluation.

    Args:
        steps: from the value to what the forward makes of it.
    """

    def __init__(self, steps: fx.GraphModule) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Any:
        return self.steps(x) if self.training else x


def join_modes(
    training: fx.GraphModule, evaluation: fx.GraphModule, may_act: Callable[[InTraining], bool] | None
) -> None:
    """Let a graph in evaluation follow its mode, in place.

    Flags that are true in training follow it. Steps that are taken in training alone become modules.

    Args:
        may_act: tells whether such steps may be a module; by default none may.

    Raises:
        ValueError: more than that differs.
    """
    nodes = list(evaluation.graph.nodes)
    evaluation.add_submodule("_mode", Mode().train(evaluation.training))
    with evaluation.graph.inserting_before(nodes[0]):
        flag = evaluation.graph.call_module("_mode")
    joining = _Joining(evaluation, flag, may_act)
    rest: Sequence[fx.Node] = list(training.graph.nodes)
    for node in nodes:
        rest = joining.join_next(rest, node)
    joining.check_steps()
    evaluation.recompile()


class _Joining:
    """Find the nodes in training of which those in evaluation, one after the other, are the same.

    Attributes:
        same: of a node in training what it is in evaluation, and what it becomes there: itself, or the
            module that makes it in training.
        steps: those in training alone, and the node in evaluation before which each is taken.
        used: the steps that are in a module.
        made: what steps would have to make of what the node at hand is given.
    """

    def __init__(
        self, evaluation: fx.GraphModule, flag: fx.Node, may_act: Callable[[InTraining], bool] | None
    ) -> None:
        self.evaluation, self.flag, self.may_act = evaluation, flag, may_act
        self.same: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self.steps: dict[fx.Node, fx.Node] = {}
        self.used: set[fx.Node] = set()
        self.made: dict[fx.Node, fx.Node] = {}

    def join_next(self, rest: Sequence[fx.Node], node: fx.Node) -> Sequence[fx.Node]:
        """Join a node with the first one of the rest that is the same; return the rest behind that."""
        reason = None
        for i, other in enumerate(rest):
            try:
                self._join(other, node)
                return rest[i + 1 :]
            except ValueError as error:
                reason = reason or error
                self.steps[other] = node
        raise reason or ValueError(f"nothing there is {describe_node(node)} here")

    def check_steps(self) -> None:
        """Raise ValueError where a step that is in no module, and that nothing reads, changes a tensor."""
        if left := [step for step in self.steps if step not in self.used and changes_tensor(step)]:
            raise ValueError(f"{describe_node(left[0])} is there alone")

    def _join(self, other: fx.Node, node: fx.Node) -> None:
        if not _is_same_call(other, node):
            raise ValueError(f"{describe_node(other)} there is {describe_node(node)} here")
        self.made = {}
        args = self._join_arguments(other.args, node.args)
        kwargs = self._join_arguments(other.kwargs, node.kwargs)
        used: set[fx.Node] = set()
        modules = [(end, *self._cut_out(end, used)) for end in self.made]
        for end, module, source in modules:
            self.same[end] = self.made[end], self._insert(module, source, self.steps[end])
        self.used |= used
        node.args = fx.map_arg(args, self._replace)
        node.kwargs = fx.map_arg(kwargs, self._replace)
        self.same[other] = node, node

    def _replace(self, node: fx.Node) -> fx.Node:
        return self.same[node][1] if node in self.made else node

    def _join_arguments(self, there: Any, here: Any) -> Any:
        """Keep the arguments in evaluation, but put the flag for what is true in training and false here.

        What a step makes stays as it is there.
        """
        if there is True and here is False:
            return self.flag
        if type(there) is not type(here):
            raise ValueError(f"{there} there is {here} here")
        if isinstance(here, fx.Node):
            if there in self.same and self.same[there][0] is here:
                return self.same[there][1]
            if there in self.steps and there not in self.same and self.made.setdefault(there, here) is here:
                return there
        elif isinstance(here, tuple | list):
            pairs = zip(there, here, strict=True)
            return type(here)(self._join_arguments(a, b) for a, b in pairs)
        elif isinstance(here, slice):
            ends = [(getattr(there, name), getattr(here, name)) for name in ("start", "stop", "step")]
            return slice(*(self._join_arguments(a, b) for a, b in ends))
        elif isinstance(here, dict) and there.keys() == here.keys():
            return {key: self._join_arguments(there[key], value) for key, value in here.items()}
        elif there == here or str(there) == str(here):
            return here
        raise ValueError(f"{there} there is {here} here")

    def _cut_out(self, end: fx.Node, used: set[fx.Node]) -> tuple[InTraining, fx.Node]:
        """Make a module of the steps that make one of them; give it and what it is to be given."""
        needed, inputs, pending = set[fx.Node](), set[fx.Node](), [end]
        while pending:
            step = pending.pop()
            if step in self.same or step not in self.steps:
                inputs.add(step)
            elif step not in needed:
                needed.add(step)
                pending += step.all_input_nodes
        reason = f"{describe_node(end)} is there alone"
        is_called = all(step.op in ("call_function", "call_method") for step in needed)
        if len(inputs) != 1 or not is_called or needed & (used | self.used):
            raise ValueError(reason)
        (source,) = inputs
        graph = fx.Graph()
        copies = {source: graph.placeholder("x")}
        for step in (step for step in self.steps if step in needed):
            copies[step] = graph.node_copy(step, copies.__getitem__)
        graph.output(copies[end])
        module = InTraining(fx.GraphModule(nn.Module(), graph)).train(self.evaluation.training)
        is_made_of_it = source in self.same and self.same[source][0] is self.made[end]
        if not is_made_of_it or self.may_act is None or not self.may_act(module):
            raise ValueError(reason)
        used |= needed
        return module, self.same[source][1]

    def _insert(self, module: InTraining, source: fx.Node, before: fx.Node) -> fx.Node:
        name = f"_in_training{len(self.same)}"
        self.evaluation.add_submodule(name, module)
        with self.evaluation.graph.inserting_before(before):
            return self.evaluation.graph.call_module(name, (source,))


def _is_same_call(other: fx.Node, node: fx.Node) -> bool:
    """Tell whether two nodes call the same, or hold the same tensor."""
    if other.target != node.target:
        return False
    if node.op != "get_attr":
        return True
    path = str(node.target)
    values = [attrgetter(path)(each.graph.owning_module) for each in (other, node)]
    return values[0] is values[1] or torch.equal(*values)
