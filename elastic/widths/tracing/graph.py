"""Trace a model, and read what a node of its graph calls."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from elastic.errors import StructureError
from elastic.widths.copying import COMPILED
from elastic.widths.hooks import list_containers, quiet_hooks
from elastic.widths.operations.interface import get_operation_name
from elastic.widths.operations.registry import find_base
from elastic.widths.parameters import get_kind
from elastic.widths.tracing.autocast import keep_regions, note_regions
from elastic.widths.tracing.batch import follow_batch
from elastic.widths.tracing.called_layers import restore_layers
from elastic.widths.tracing.changing import renew_assigned
from elastic.widths.tracing.concrete import PLACE, ConcreteTracer
from elastic.widths.tracing.constants import Constants, note_constants
from elastic.widths.tracing.containers import Container, mark_lists, trace_contents, watch_containers
from elastic.widths.tracing.functions import trace_functions
from elastic.widths.tracing.gradients import cut_gradients
from elastic.widths.tracing.integers import Namespace, find_namespaces, trace_integers
from elastic.widths.tracing.looking import list_kept, trace_hooks, trace_kept
from elastic.widths.tracing.meta import has_own_forward
from elastic.widths.tracing.patching import (
    leave_modules,
    leave_out_old_hooks,
    pass_for_values,
    trace_constructors,
    trace_distributions,
    trace_factories,
    trace_wrappers,
)
from elastic.widths.tracing.sizes import AttributePlace, note_computed_sizes, tag_sizes

RESERVED = ("code", "graph")  # properties of a traced network


class _Tracer(ConcreteTracer):
    """Keep layers with a rule of their own whole."""

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Look into what is none of the model's modules: `nn.ReLU()(x)`, or a slice `self.layers[1:](x)`."""
        if m in self._submodules:
            return super().call_module(m, forward, args, kwargs)
        if type(m) is not nn.Sequential and next(chain(m.parameters(), m.buffers()), None) is not None:
            raise StructureError(
                f"a {type(m).__name__} that the forward calls is no submodule of the model: make it in "
                "__init__, and hold it in an attribute or an nn.ModuleList"
            )
        return forward(*args, **kwargs)

    @cached_property
    def _submodules(self) -> set[nn.Module]:
        return set(self.root.modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kind = get_kind(m)
        if has_own_forward(m):
            return False
        if find_base(kind) is not None:
            return True
        is_foreign = not kind.__module__.startswith("torch.nn")
        return not is_foreign and super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, *example: Tensor) -> fx.GraphModule:
    """Trace a model with torch.fx; the result has the model's own layers.

    Args:
        example: inputs on the meta device; with them, a forward may ask for sizes.

    Raises:
        StructureError: torch.fx cannot trace it.
    """
    _refuse_unfit(model)
    with preserve_attributes(model):
        graph = trace_graph(model, *example, runs=True)
        follow_batch(graph, partial(trace_graph, model, runs=True), *example)
        _decide_lists(graph, model, *example)
        traced = fx.GraphModule(model, graph)
    restore_layers(traced, model)
    return traced


def _refuse_unfit(model: nn.Module) -> None:
    """Raise StructureError where a traced network would lack a part of the model, or what that does."""
    for name in RESERVED:
        if name in model._modules | model._parameters | model._buffers:
            raise StructureError(
                f"torch.fx has '{name}' for itself: give that part of the {type(model).__name__} another name"
            )
    tracer = _Tracer()
    for path, module in model.named_modules():
        if module._is_full_backward_hook is False and not tracer.is_leaf_module(module, path):
            raise StructureError(
                f"{path or type(model).__name__} has a backward hook of the old kind: register it by "
                "register_full_backward_hook"
            )


def _decide_lists(graph: fx.Graph, model: nn.Module, *example: Tensor) -> None:
    """Decide whether a forward empties lists that were empty, or leaves that to the program."""
    containers: list[Container] = graph.containers  # type: ignore[attr-defined]
    unknown = [container for container in containers if container.is_kept and container.appends is None]
    if not unknown:
        return
    with mark_lists(unknown), suppress(StructureError):  # the forward may work with what is in a list
        again: Any = trace_graph(model, *example, runs=True)
        appends = {id(container.value): container.appends for container in again.containers}
        for container in unknown:
            container.appends = appends[id(container.value)]


@contextmanager
def preserve_attributes(model: nn.Module) -> Iterator[None]:
    """Take back what a forward keeps in its modules while it is traced, and what torch.fx puts there."""
    attributes = {module: dict(vars(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, values in attributes.items():
            vars(module).clear()
            vars(module).update(values)


def trace_graph(
    model: nn.Module,
    *example: Tensor,
    known_answers: Sequence[Any] | None = None,
    sizes: Mapping[AttributePlace, int] | None = None,
    runs: bool = False,
) -> fx.Graph:
    """Trace a model's graph alone, whose nodes call the model's own layers; see `trace`.

    Args:
        known_answers: what the forward was told about shapes when it was traced before, and is told again.
        sizes: whole numbers that modules are to hold, in place of those that they do.
        runs: whether the graph is to be run: functions that have a gradient of their own stay whole, and
            random numbers are drawn each time. Attributes of the model's modules are to be preserved then.
    """
    trace_with = partial(_trace_graph, model, *example, known_answers=known_answers, sizes=sizes, runs=runs)
    if namespaces := find_namespaces(model):
        with suppress(StructureError):  # not all code that takes a number takes a traced one
            return trace_with(namespaces=namespaces)
    return trace_with(namespaces=())


def _trace_graph(
    model: nn.Module,
    *example: Tensor,
    namespaces: Sequence[Namespace],
    known_answers: Sequence[Any] | None,
    sizes: Mapping[AttributePlace, int] | None,
    runs: bool,
) -> fx.Graph:
    """Trace a model's graph alone, see `trace_graph`, with the numbers that functions of namespaces round."""
    tracer = _Tracer(example, known_answers, runs)
    containers: list[Container] = []
    earlier_values = [value for module in model.modules() for value in vars(module).values()]
    if runs:
        for module in model.modules():  # compiled parts compute what their forwards do
            vars(module).pop(COMPILED, None)
        containers = watch_containers(model)
        tracer.copy_model(model)  # before the forward keeps in it what stands for tensors
    try:
        with (
            tag_sizes(model, sizes) as read,
            trace_factories(tracer, runs),
            trace_functions(tracer, runs),
            trace_integers(tracer, namespaces),
            note_computed_sizes() as computed,
            take_back_assigned(model) as replaced,
            pass_for_values(),
            leave_modules(),
            trace_wrappers(),
            trace_constructors(),
            trace_distributions(),
            leave_out_old_hooks(model),
            quiet_hooks(model),
            _note_what_is_left_out(tracer, model) if runs else nullcontext() as constants,
            torch.enable_grad(),  # whatever the mode is outside of the forward
        ):
            graph = tracer.trace(model)
            if runs:
                trace_kept(tracer, model, earlier_values, tracer.gives_tensor)
                trace_contents(tracer, containers, tracer.gives_tensor)
            else:
                graph.kept = list_kept(model)  # type: ignore[attr-defined]
        graph.owning_module = model  # type: ignore[assignment]
        renew_assigned(graph, partial(get_layer, model), tracer.gives_tensor)
        if runs:
            if model.training:
                cut_gradients(graph, tracer.gives_tensor)
            keep_regions(graph, tracer.device.type, tracer.gives_tensor)
        graph.computed_sizes, graph.read_sizes = computed, read  # type: ignore[attr-defined]
        graph.answers, graph.replaced = tracer.answers, replaced  # type: ignore[attr-defined]
        graph.constants = constants  # type: ignore[attr-defined]
        graph.containers = containers  # type: ignore[attr-defined]
        return graph
    except StructureError:
        raise
    except Exception as error:  # the model's own forward runs here: anything may come
        raise StructureError(
            f"{type(model).__name__} cannot be traced by torch.fx ({shorten(error)}); let torch.where choose "
            "by data, and hide a function that chooses by shapes behind torch.fx.wrap"
        ) from error
    finally:
        tracer.is_over = True


@contextmanager
def _note_what_is_left_out(tracer: ConcreteTracer, model: nn.Module) -> Iterator[Constants]:
    """Note what torch.fx leaves out of a graph that is to be run: hooks, autocast, what modules hold."""
    with trace_hooks(tracer, model), note_regions(tracer.regions), note_constants(model) as constants:
        yield constants


@contextmanager
def take_back_assigned(model: nn.Module) -> Iterator[list[Any]]:
    """Put back what a forward assigns to, such as statistics: what it computes while traced is no value.

    What it keeps in dictionaries and lists of its modules, as caches do, is taken back, too. The list has, at
    the end, what had been put in the place of other values.
    """
    replaced: list[Any] = []
    tables = [t for m in model.modules() for t in (vars(m), m._buffers, m._parameters)]
    before = [(own, dict(own)) for own in tables]
    contents = [(value, copy.copy(value)) for value in list_containers(model)]
    try:
        yield replaced
    finally:
        for own, values in before:
            assigned = {k: value for k, value in values.items() if _is_assigned(value, own.get(k))}
            own.update(assigned)
            for name in [k for k, value in own.items() if k not in values and _is_assigned(None, value)]:
                del own[name]
            replaced += assigned.values()
        for container, content in contents:
            old, new = (list(x.values()) if type(x) is dict else x for x in (content, container))
            replaced += (a for a, b in zip(old, new, strict=False) if a is not b)
            container.clear()
            (container.update if type(container) is dict else container.extend)(content)


def _is_assigned(before: Any, now: Any) -> bool:
    """Tell whether something was put in an attribute's place: what is traced, or a tensor for another."""
    parts = now if type(now) in (tuple, list) else (now,)
    is_traced = any(issubclass(type(part), fx.Proxy) for part in parts)
    return is_traced or (isinstance(before, Tensor) and now is not before)


def get_layer(traced: nn.Module, node: fx.Node) -> nn.Module | None:
    """Get the layer that a node calls, if it calls one."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def describe_node(node: fx.Node) -> str:
    """Name an operation as a user would find it: `view(-1, 400) in features.6`."""
    owner = node.graph.owning_module
    layer = get_layer(owner, node) if owner is not None else None
    if layer is not None:
        return f"{node.target} ({type(layer).__name__})"
    place = node.meta.get(PLACE) or "the model's forward"
    shown = ", ".join("…" if isinstance(a, fx.Node) else str(a) for a in _flatten(node.args[1:]))
    return f"{get_operation_name(node)}({shown}) in {place}"


def _flatten(arguments: Sequence[object]) -> Iterator[object]:
    for argument in arguments:
        yield from argument if isinstance(argument, tuple | list) else (argument,)


def shorten(error: Exception) -> str:
    """Give an error's first line."""
    return str(error).strip().split("\n")[0]
