"""Trace a model in training and in evaluation as one graph, which follows its mode."""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from elastic.errors import StructureError
from elastic.widths.hooks import is_look, quiet_hooks
from elastic.widths.inputs import count_batch
from elastic.widths.leaves import list_tensors
from elastic.widths.mode import preserve_modes, set_mode
from elastic.widths.tracing.batch import resize_batch
from elastic.widths.tracing.by_mode import ByMode, list_graphs
from elastic.widths.tracing.graph import (
    preserve_attributes,
    take_back_assigned,
    trace,
    trace_graph,
)
from elastic.widths.tracing.guard import REMEDY, Guard, sign
from elastic.widths.tracing.meta import BATCH_NORM, compute_without_data, make_meta_copy
from elastic.widths.tracing.norms import drop_counters
from elastic.widths.tracing.proxies import TrainingFlag
from elastic.widths.tracing.sizes import AttributePlace


def sync_traced(traced: fx.GraphModule, model: nn.Module, training: bool) -> None:
    """Give a traced network a mode, and the model's buffers, which moving the model replaces."""
    traced.training = training
    for graph in list_graphs(traced):
        for node in graph.find_nodes(op="call_module"):
            layer = traced.get_submodule(str(node.target))
            if isinstance(layer, BATCH_NORM):  # which may stand for the model's
                layer.training = model.get_submodule(str(node.target)).training
        for node in graph.find_nodes(op="get_attr"):
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
    watcher = _WatchedMode()
    modes = {module: vars(module).pop("training") for module in model.modules()}
    setattr(nn.Module, "training", watcher)  # noqa: B010
    try:
        yield watcher.flags
    finally:
        delattr(nn.Module, "training")
        for module, mode in modes.items():
            vars(module)["training"] = mode


def trace_modes(model: nn.Module, *example: Tensor) -> list[fx.Graph]:
    """Trace a model in training, and in evaluation where more than flags differ; its mode changes."""
    switches = {(type(module).train, type(module).eval) for module in model.modules()}
    is_usual = switches == {(nn.Module.train, nn.Module.eval)}  # the flags tell the mode
    training, decides = _trace_training(model if is_usual else set_mode(model, True), *example)
    graphs = [training]
    if not is_usual or decides:
        evaluation = trace_graph(set_mode(model), *example)
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
        yield trace_graph(set_mode(model, training), *example, known_answers=answers, sizes=sizes)


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
        return trace_graph(set_mode(model, True), *example), True
    return graph, any(flag.use == "decides" for flag in flags)


def trace_both_modes(model: nn.Module, *example: Tensor) -> fx.GraphModule:
    """Trace a model to be trained and evaluated, as a `ByMode` where its graph differs.

    Args:
        example: inputs on the meta device; with them, a forward may ask for sizes.

    Raises:
        StructureError: torch.fx cannot trace it; or it keeps statistics by assigning to attributes, draws
            numbers that are none of torch's, or computes with numbers that it counts itself, or with the
            number of samples as one of Python's.
    """
    with preserve_modes(model), _expect_no_numbers(model):
        training, evaluation = (trace(set_mode(model, mode), *example) for mode in (True, False))
        for traced, mode in ((training, True), (evaluation, False)):
            _require_no_counts(traced, set_mode(model, mode), *example)
            _require_no_batch(traced, set_mode(model, mode), *example)
        _require_no_statistics(training, evaluation)
        for traced in (training, evaluation):
            drop_counters(traced)
        guard = _make_guard(model, example, training, evaluation)
    traced_net = evaluation if training.code == evaluation.code else ByMode(training, evaluation)
    traced_net.training = model.training
    traced_net.register_forward_pre_hook(guard)
    return traced_net


def _require_no_counts(traced: fx.GraphModule, model: nn.Module, *example: Tensor) -> None:
    """Raise StructureError where a forward computes with a number that it changes itself, call by call."""
    counts = traced.graph.constants.counts  # type: ignore[attr-defined]
    if not counts:
        return
    with preserve_attributes(model):
        for attribute, number in counts.items():
            vars(model.get_submodule(attribute.path))[attribute.name] = number
        is_same = sign(trace(model, *example)).is_like(sign(traced))
    if not is_same:
        raise StructureError(
            f"the forward changes '{', '.join(map(str, counts))}' and computes with it, which is a constant "
            f"once the network is traced: {REMEDY}"
        )


def _require_no_batch(traced: fx.GraphModule, model: nn.Module, *example: Tensor) -> None:
    """Raise StructureError where a trace is right for batches of the example's size alone."""
    samples = count_batch(example)
    for inputs in (resize_batch(example, number) for number in (samples + 1, 2 * samples)):
        runs = make_meta_copy(model).forward, _WithoutLooks(make_meta_copy(traced)).run
        with _leaving_nothing(model):
            shapes, shapes_traced = (_find_output_shapes(run, inputs) for run in runs)
        if shapes is not None and shapes != shapes_traced:
            raise StructureError(
                f"{type(model).__name__} can be traced for {samples} samples alone: let its forward compute "
                "with x.shape[0] as it is, and not sample by sample"
            )


@contextmanager
def _leaving_nothing(model: nn.Module) -> Iterator[None]:
    """Take back what copies of a model leave in it by hooks, and the numbers that they draw."""
    with (
        preserve_attributes(model),
        take_back_assigned(model),
        quiet_hooks(model),
        torch.random.fork_rng(devices=[]),
    ):
        yield


class _WithoutLooks(fx.Interpreter):
    """Run a graph without data, but for what only looks on."""

    def run_node(self, n: fx.Node) -> Any:
        if is_look(n):
            return None
        if n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return compute_without_data(n, None, args, kwargs)


def _find_output_shapes(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[torch.Size] | None:
    """Find the shapes of a network's outputs; None where it fails, as for a batch that it does not take."""
    try:
        return [tensor.shape for tensor in list_tensors(run(*inputs))]
    except Exception:  # the model's own forward runs here: anything may come
        return None


def _make_guard(
    model: nn.Module, example: tuple[Tensor, ...], training: fx.GraphModule, evaluation: fx.GraphModule
) -> Guard:
    """Make what holds a network against its traces; what its mode changes, these follow."""
    traces = {True: training, False: evaluation}
    constants = {mode: traced.graph.constants for mode, traced in traces.items()}  # type: ignore[attr-defined]
    values = []
    for mode in traces:
        model.train(mode)
        attributes = constants[True].reads | constants[False].reads
        values.append({a: repr(vars(model.get_submodule(a.path)).get(a.name)) for a in attributes})
    by_mode = {attribute for attribute in values[0] if values[0][attribute] != values[1][attribute]}
    return Guard(
        model,
        example,
        traces,
        {mode: constants[mode].reads - by_mode for mode in traces},
        constants[True].modes | constants[False].modes,
    )


@contextmanager
def _expect_no_numbers(model: nn.Module) -> Iterator[None]:
    """Raise StructureError where numbers are drawn while a model is traced, once for all."""
    before = _get_random_states()
    yield
    if _get_random_states() != before:
        raise StructureError(
            f"{type(model).__name__} draws numbers in its forward that are constants once it is traced: draw "
            "them by torch.rand, torch.bernoulli and the like"
        )


def _get_random_states() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2]


def _require_no_statistics(training: fx.GraphModule, evaluation: fx.GraphModule) -> None:
    """Raise StructureError where, in training alone, a tensor that the forward reads is assigned to."""
    replaced = [list(map(id, traced.graph.replaced)) for traced in (training, evaluation)]  # type: ignore[attr-defined]
    for traced in (training, evaluation):
        for node in traced.graph.find_nodes(op="get_attr"):
            path = str(node.target)
            tensor = id(attrgetter(path)(traced))
            if tensor in replaced[0] and tensor not in replaced[1]:
                name = path.rpartition(".")[2]
                raise StructureError(
                    f"the forward assigns to '{path}' in training, which a traced network cannot: change the "
                    f"tensor in place, as self.{name}.copy_(…) does"
                )
