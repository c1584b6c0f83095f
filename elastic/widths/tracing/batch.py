"""Let numbers that a forward has computed from the number of samples follow it in a traced network.

Where Python insists on a number, `int(x.shape[0] / 2)`, a graph holds what it was for the example's batch. A
trace of twice as many samples shows which numbers are proportional to them.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from elastic.widths.inputs import count_batch, mark_batched
from elastic.widths.tracing.concrete import expect_same
from elastic.widths.tracing.constants import CONSTANT

Scale = Callable[[Any], fx.Node]


def resize_batch(example: tuple[Tensor, ...], samples: int) -> tuple[Tensor, ...]:
    """Make inputs without data like those of an example, of so many samples."""
    pairs = mark_batched(example)
    return tuple(x.new_empty((samples, *x.shape[1:])) if has_batch else x for x, has_batch in pairs)


def follow_batch(graph: fx.Graph, trace_graph: Callable[..., fx.Graph], *example: Tensor) -> None:
    """Let numbers in a graph that are proportional to the number of samples be computed from it.

    Where a forward takes no other batch, or goes another way for it, nothing is changed.

    Args:
        trace_graph: traces the forward that the graph is of, for other inputs.
    """
    inputs = zip(graph.find_nodes(op="placeholder"), mark_batched(example), strict=False)
    batched = [node for node, (_, has_batch) in inputs if has_batch]
    if not batched or not graph.find_nodes(op="call_function", target=expect_same):
        return
    samples = count_batch(example)
    try:
        doubled = trace_graph(*resize_batch(example, 2 * samples))
    except Exception:  # the model's own forward runs here: anything may come
        return
    pairs = list(zip(graph.nodes, doubled.nodes, strict=False))
    is_same = len(graph.nodes) == len(doubled.nodes) and all(_call_same(a, b) for a, b in pairs)
    numbers = [pair for a, b in pairs for pair in _list_other(_list_arguments(a), _list_arguments(b))]
    if is_same and numbers and all(_is_double(a, b) for a, b in numbers):
        _compute_numbers(graph, pairs, batched[0], samples)


def _compute_numbers(
    graph: fx.Graph, pairs: list[tuple[fx.Node, fx.Node]], source: fx.Node, samples: int
) -> None:
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        shape = graph.call_function(getattr, (source, "shape"))
    with graph.inserting_after(shape):
        count = graph.call_function(operator.getitem, (shape, 0))

    def scale(number: Any) -> fx.Node:
        if isinstance(number, float):
            return graph.call_function(operator.mul, (count, number / samples))
        return graph.call_function(
            operator.floordiv, (graph.call_function(operator.mul, (count, number)), samples)
        )

    for node, other in pairs:
        if not list(_list_other(_list_arguments(node), _list_arguments(other))):
            continue
        if node.target is expect_same:
            graph.erase_node(node)
            continue
        with graph.inserting_before(node):
            node.args = _scale_numbers(node.args, other.args, scale)
            node.kwargs = _scale_numbers(dict(node.kwargs), dict(other.kwargs), scale)


def _call_same(ours: fx.Node, theirs: fx.Node) -> bool:
    """Tell whether two nodes do the same, or give tensors that the forward has made with the same entries."""
    if ours.op != "get_attr" or not str(ours.target).startswith(CONSTANT):
        return bool(ours.target == theirs.target)
    a, b = (getattr(node.graph.owning_module, str(node.target), None) for node in (ours, theirs))
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)


def _list_arguments(node: fx.Node) -> tuple[Any, Any]:
    return node.args, dict(node.kwargs)


def _list_parts(value: Any) -> list[Any]:
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    return list(value.values() if isinstance(value, dict) else value)


def _list_other(ours: Any, theirs: Any) -> Iterator[tuple[Any, Any]]:
    """List what is another value in the arguments of two nodes, wherever no node gives it."""
    if isinstance(ours, tuple | list | dict | slice) and type(ours) is type(theirs):
        first, second = _list_parts(ours), _list_parts(theirs)
        if len(first) != len(second):
            yield ours, theirs
        for a, b in zip(first, second, strict=False):
            yield from _list_other(a, b)
    elif not isinstance(ours, fx.Node) and not _is_same(ours, theirs):
        yield ours, theirs


def _is_same(ours: Any, theirs: Any) -> bool:
    return type(ours) is type(theirs) and bool(ours == theirs)


def _is_double(ours: Any, theirs: Any) -> bool:
    return isinstance(ours, int | float) and isinstance(theirs, int | float) and theirs == 2 * ours


def _scale_numbers(ours: Any, theirs: Any, scale: Scale) -> Any:
    """Return a node's arguments with nodes in the places of numbers that another batch has changed."""
    if isinstance(ours, slice):
        return slice(*_scale_numbers(_list_parts(ours), _list_parts(theirs), scale))
    if isinstance(ours, dict):
        return {name: _scale_numbers(ours[name], theirs[name], scale) for name in ours}
    if isinstance(ours, tuple | list):
        parts = [_scale_numbers(a, b, scale) for a, b in zip(ours, theirs, strict=True)]
        return tuple(parts) if isinstance(ours, tuple) else parts
    return ours if isinstance(ours, fx.Node) or _is_same(ours, theirs) else scale(ours)
