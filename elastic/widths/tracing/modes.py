"""Trace a model in training and in evaluation as one graph, which follows its mode."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from elastic.errors import StructureError
from elastic.widths.operations.registry import is_whole
from elastic.widths.parameters import get_kind
from elastic.widths.tracing.graph import describe_node, preserve_attributes, trace, trace_graph
from elastic.widths.tracing.meta import BATCH_NORM
from elastic.widths.tracing.proxies import TrainingFlag
from elastic.widths.tracing.sizes import AttributePlace

MODE = "_mode"  # where a traced network holds its own


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Bring each module back into the mode it was in, whatever happens: some may be frozen."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Mode(nn.Module):
    """Say whether it is in training: what `self.training` was before torch.fx made a constant of it."""

    def forward(self) -> bool:
        return self.training


def sync_traced(traced: fx.GraphModule, model: nn.Module, training: bool) -> None:
    """Give a traced network a mode, and the model's buffers, which moving the model replaces."""
    for node in traced.graph.find_nodes(op="call_module"):
        layer = traced.get_submodule(str(node.target))
        if isinstance(layer, BATCH_NORM):  # which may stand for the model's
            layer.training = model.get_submodule(str(node.target)).training
    if isinstance(mode := traced._modules.get(MODE), Mode):
        mode.training = training
    for node in traced.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        buffers = model.get_submodule(path)._buffers
        if name in buffers:
            traced.get_submodule(path)._buffers[name] = buffers[name]


class _WatchedMode:
    """Stand for `training` of all modules, and keep the flags that stand for its value."""

    def __init__(self) -> None:
        self.flags: list[TrainingFlag] = []

    def __get__(self, module: nn.Module | None, kind: type[nn.Module]) -> TrainingFlag:
        self.flags.append(TrainingFlag())
        return self.flags[-1]


@contextmanager
def _watch_mode(model: nn.Module) -> Iterator[list[TrainingFlag]]:
    """Watch what becomes of the mode of a model in training, wherever its modules ask for it."""
    watched = _WatchedMode()
    modes = {module: vars(module).pop("training") for module in model.modules()}
    setattr(nn.Module, "training", watched)  # noqa: B010
    try:
        yield watched.flags
    finally:
        delattr(nn.Module, "training")
        for module, mode in modes.items():
            vars(module)["training"] = mode


def trace_modes(model: nn.Module, *example: Tensor) -> list[fx.Graph]:
    """Trace a model in training, and in evaluation where more than flags differ; its mode changes."""
    switches = {(type(module).train, type(module).eval) for module in model.modules()}
    is_usual = switches == {(nn.Module.train, nn.Module.eval)}  # the flags tell the mode
    training, decides = _trace_training(model if is_usual else model.train(), *example)
    graphs = [training]
    if not is_usual or decides:
        evaluation = trace_graph(model.eval(), *example)
        texts = {re.sub("True|False", "flag", str(graph)) for graph in (training, evaluation)}
        graphs += [evaluation] if len(texts) > 1 else []
    for graph in graphs:
        graph.trace_again = partial(_trace_again, graph, graph is training, *example)  # type: ignore[attr-defined]
    return graphs


@contextmanager
def _trace_again(
    graph: fx.Graph, training: bool, *example: Tensor, sizes: Mapping[AttributePlace, int]
) -> Iterator[fx.Graph]:
    """Trace the forward of a graph with other numbers in its modules, as if shapes stayed as they are.

    Raises:
        StructureError: the forward fails with them.
    """
    model = graph.owning_module
    assert isinstance(model, nn.Module)
    with preserve_modes(model), preserve_attributes(model), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # a forward may draw constants
        answers = graph.answers  # type: ignore[attr-defined]
        yield trace_graph(model.train(training), *example, known_answers=answers, sizes=sizes)


def _trace_training(model: nn.Module, *example: Tensor) -> tuple[fx.Graph, bool]:
    """Trace a model in training, and tell whether it may be another graph in evaluation, beyond flags."""
    graph: fx.Graph | None = None
    with _watch_mode(model) as flags:
        try:
            graph = trace_graph(model, *example)
        except StructureError:
            if not flags:
                raise
    if graph is None or any(flag.use is None for flag in flags):  # the forward wants a bool itself
        return trace_graph(model.train(), *example), True
    return graph, any(flag.use == "decides" for flag in flags)


def trace_both_modes(model: nn.Module, *example: Tensor) -> fx.GraphModule:
    """Trace a model to be trained and evaluated: flags like training=self.training follow its mode.

    Modules that act in training alone, such as stochastic depth, are then not looked into.

    Args:
        example: inputs on the meta device; with them, a forward may ask for sizes.

    Raises:
        StructureError: torch.fx cannot trace it, or it is another network in training than in evaluation.
    """
    try:
        return _trace_and_join(model, *example)
    except ValueError as error:
        if whole := [module for module in model.modules() if acts_in_training_alone(module)]:
            with suppress(ValueError):
                return _trace_and_join(model, *example, whole=whole)
        raise StructureError(
            f"{type(model).__name__} is another network in training than in evaluation ({error}): only flags "
            "like F.dropout(x, training=self.training) may differ, and modules that give back what they are "
            "given"
        ) from error


def acts_in_training_alone(module: nn.Module) -> bool:
    """Tell whether a module of no tensors gives in evaluation what it is given, and zeros for zeros always.

    Modules for stochastic depth, and for dropping blocks, are of that kind.
    """
    kind = get_kind(module)
    is_plain = next(chain(module.children(), module.parameters(), module.buffers()), None) is None
    if not is_plain or kind.__module__.startswith("torch.") or is_whole(kind):
        return False
    x = torch.linspace(-1, 1, 2 * 8 * 16 * 16).view(2, 8, 16, 16)
    try:
        with preserve_modes(module), torch.random.fork_rng(devices=[]), torch.no_grad():
            zeros = torch.zeros_like(x)
            return torch.equal(module.eval()(x), x) and torch.equal(module.train()(zeros), zeros)
    except Exception:  # it is the model's own, and not made for such an input
        return False


def _trace_and_join(model: nn.Module, *example: Tensor, whole: Collection[nn.Module] = ()) -> fx.GraphModule:
    """Trace a model as one graph; raise ValueError where it is another network in training."""
    with preserve_modes(model):
        training, traced = (trace(model.train(mode), *example, whole=whole) for mode in (True, False))
    for graph_module in (training, traced):
        _drop_counters(graph_module)
    traced.training = model.training
    if traced.code != training.code:
        _join_modes(training, traced)
    return traced


def _drop_counters(traced: fx.GraphModule) -> None:
    """Leave out that norms count batches in training, which no momentum of theirs needs."""
    for node in traced.graph.find_nodes(op="get_attr"):
        is_counter, users = str(node.target).endswith("num_batches_tracked"), list(node.users)
        if is_counter and all(user.target == "add_" and not user.users for user in users):
            for unused in (*users, node):
                traced.graph.erase_node(unused)
    traced.recompile()


def _join_modes(training: fx.GraphModule, evaluation: fx.GraphModule) -> None:
    """Let the flags in evaluation follow a mode; raise ValueError where more than flags differ."""
    # Of two graphs of unequal length the shorter one ends where the other one goes on: that pair differs.
    pairs = list(zip(training.graph.nodes, evaluation.graph.nodes, strict=False))
    evaluation.add_submodule(MODE, Mode().train(evaluation.training))
    with evaluation.graph.inserting_before(pairs[0][1]):
        flag = evaluation.graph.call_module(MODE)
    for train_node, eval_node in pairs:
        if not _is_same_call(train_node, eval_node):
            raise ValueError(f"{describe_node(train_node)} there is {describe_node(eval_node)} here")
        eval_node.args = _join_arguments(train_node.args, eval_node.args, flag)
        eval_node.kwargs = _join_arguments(train_node.kwargs, eval_node.kwargs, flag)
    evaluation.recompile()


def _is_same_call(train_node: fx.Node, eval_node: fx.Node) -> bool:
    """Tell whether two nodes call the same, or hold the same tensor."""
    if train_node.target != eval_node.target:
        return False
    if eval_node.op != "get_attr":
        return True
    path = str(eval_node.target)
    values = [attrgetter(path)(node.graph.owning_module) for node in (train_node, eval_node)]
    return values[0] is values[1] or torch.equal(*values)


def _join_arguments(train_value: Any, eval_value: Any, flag: fx.Node) -> Any:
    """Keep the arguments in evaluation, but put the flag for what is true in training and false here."""
    if isinstance(eval_value, tuple | list):
        pairs = zip(train_value, eval_value, strict=True)
        return type(eval_value)(_join_arguments(a, b, flag) for a, b in pairs)
    if isinstance(eval_value, dict):
        return {key: _join_arguments(train_value[key], value, flag) for key, value in eval_value.items()}
    if train_value is True and eval_value is False:
        return flag
    if train_value != eval_value and str(train_value) != str(eval_value):  # nodes of two graphs agree by name
        raise ValueError(f"{train_value} there is {eval_value} here")
    return eval_value
