"""Let numbers that a forward has computed from the number of samples follow it in a traced network.

Where Python insists on a number, `int(x.shape[0] / 2)`, a graph holds what it was for the example's batch. A
trace of twice as many samples shows which numbers are proportional to them.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from elastic.widths.inputs import count_batch, mark_batched
from elastic.widths.tracing.constants import CONSTANT
from elastic.widths.tracing.expecting import expect_same


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
    is_same = len(graph.nodes) == len(doubled.nodes) and all(_call_same(*pair) for pair in pairs)
    numbers = [(node, _list_values(node), _list_values(double)) for node, double in pairs]
    changes = [(node, doubles) for node, values, doubles in numbers if any(map(_is_other, values, doubles))]
    if is_same and changes and all(_are_doubled(values, doubles) for _, values, doubles in numbers):
        _compute_numbers(graph, changes, batched[0], samples)


def _compute_numbers(
    graph: fx.Graph, changes: list[tuple[fx.Node, list[Any]]], source: fx.Node, samples: int
) -> None:
    """Put nodes in the places of numbers that are others for twice as many samples."""
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        shape = graph.call_function(getattr, (source, "shape"))
    with graph.inserting_after(shape):
        count = graph.call_function(operator.getitem, (shape, 0))

    def scale(number: Any) -> fx.Node:
        if isinstance(number, float):
            return graph.call_function(operator.mul, (count, number / samples))
        product = graph.call_function(operator.mul, (count, number))
        return graph.call_function(operator.floordiv, (product, samples))

    for node, doubles in changes:
        if node.target is expect_same:
            graph.erase_node(node)
            continue
        remaining = iter(doubles)

        def replace(value: Any, remaining: Iterator[Any] = remaining) -> Any:
            return scale(value) if _is_other(value, next(remaining)) else value

        with graph.inserting_before(node):
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), replace)


def _list_values(node: fx.Node) -> list[Any]:
    """List what a node is given, out of containers."""
    values: list[Any] = []
    map_aggregate((node.args, node.kwargs), values.append)
    return values


def _is_other(value: Any, double: Any) -> bool:
    """Tell whether a value that no node gives is another one for twice as many samples."""
    return not isinstance(value, fx.Node) and (type(value) is not type(double) or value != double)


def _are_doubled(values: list[Any], doubles: list[Any]) -> bool:
    """Tell whether all that is another value is a number, and twice as large."""
    pairs = [pair for pair in zip(values, doubles, strict=False) if _is_other(*pair)]
    are_numbers = all(isinstance(value, int | float) for pair in pairs for value in pair)
    return len(values) == len(doubles) and are_numbers and all(b == 2 * a for a, b in pairs)


def _call_same(node: fx.Node, other: fx.Node) -> bool:
    """Tell whether two nodes do the same, or give tensors that the forward has made with the same entries."""
    if node.op != "get_attr" or not str(node.target).startswith(CONSTANT):
        return bool(node.target == other.target)
    a, b = (getattr(source.graph.owning_module, str(source.target), None) for source in (node, other))
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.is_meta or torch.equal(a, b)  # a copy without data is traced for its shapes alone
