"""Trace a model in training and in evaluation as one graph, which follows its mode."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain

import torch
from torch import Tensor, fx, nn

from elastic.errors import StructureError
from elastic.widths.operations.registry import is_whole
from elastic.widths.parameters import get_kind
from elastic.widths.tracing.graph import preserve_attributes, trace, trace_graph
from elastic.widths.tracing.joining import InTraining, Mode, join_modes
from elastic.widths.tracing.meta import BATCH_NORM
from elastic.widths.tracing.proxies import TrainingFlag
from elastic.widths.tracing.sizes import AttributePlace


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Bring each module back into the mode it was in, whatever happens: some may be frozen."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def sync_traced(traced: fx.GraphModule, model: nn.Module, training: bool) -> None:
    """Give a traced network a mode, and the model's buffers, which moving the model replaces."""
    for node in traced.graph.find_nodes(op="call_module"):
        layer = traced.get_submodule(str(node.target))
        if isinstance(layer, BATCH_NORM):  # which may stand for the model's
            layer.training = model.get_submodule(str(node.target)).training
        elif isinstance(layer, InTraining | Mode):
            layer.training = training
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

    What acts in training alone, such as stochastic depth, is one module: the model's own, or `InTraining`.

    Args:
        example: inputs on the meta device; with them, a forward may ask for sizes.

    Raises:
        StructureError: torch.fx cannot trace it, or it is another network in training than in evaluation.
    """
    with suppress(ValueError):
        return _trace_and_join(model, *example)
    try:
        whole = [module for module in model.modules() if acts_in_training_alone(module)]
        return _trace_and_join(model, *example, whole=whole, may_act=acts_in_training_alone)
    except ValueError as error:
        raise StructureError(
            f"{type(model).__name__} is another network in training than in evaluation ({error}): only flags "
            "like F.dropout(x, training=self.training) may differ, and modules or steps that give back what "
            "they are given"
        ) from error


def acts_in_training_alone(module: nn.Module) -> bool:
    """Tell whether a module of no tensors gives in evaluation what it is given, and zeros for zeros always.

    Modules for stochastic depth, and for dropping blocks, are of that kind.
    """
    kind = get_kind(module)
    children = () if isinstance(module, InTraining) else module.children()
    is_plain = next(chain(children, module.parameters(), module.buffers()), None) is None
    if not is_plain or kind.__module__.startswith("torch.") or is_whole(kind):
        return False
    x = torch.linspace(-10, 10, 2 * 8 * 16 * 16).pow(5).view(2, 8, 16, 16)  # large and small
    try:
        with preserve_modes(module), torch.random.fork_rng(devices=[]), torch.no_grad():
            zeros = torch.zeros_like(x)
            given = torch.equal(module.eval()(x.clone()), x)  # it may change what it is given
            return given and torch.equal(module.train()(zeros.clone()), zeros)
    except Exception:  # it is the model's own, and not made for such an input
        return False


def _trace_and_join(
    model: nn.Module,
    *example: Tensor,
    whole: Collection[nn.Module] = (),
    may_act: Callable[[InTraining], bool] | None = None,
) -> fx.GraphModule:
    """Trace a model as one graph; raise ValueError where it is another network in training."""
    with preserve_modes(model):
        training, traced = (trace(model.train(mode), *example, whole=whole) for mode in (True, False))
    for graph_module in (training, traced):
        _drop_counters(graph_module)
    traced.training = model.training
    if traced.code != training.code:
        join_modes(training, traced, may_act)
    return traced


def _drop_counters(traced: fx.GraphModule) -> None:
    """Leave out that norms count batches in training, which no momentum of theirs needs."""
    for node in traced.graph.find_nodes(op="get_attr"):
        is_counter, users = str(node.target).endswith("num_batches_tracked"), list(node.users)
        if is_counter and all(user.target == "add_" and not user.users for user in users):
            for unused in (*users, node):
                traced.graph.erase_node(unused)
    traced.recompile()
