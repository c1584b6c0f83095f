"""Follow what compares the entries along one dimension: max, sort, topk, median, argmax."""

from torch import Tensor, fx

from elastic.widths.operations.interface import (
    Axes,
    Tracker,
    get_argument,
    get_axes,
    get_input,
    get_operation_name,
    get_value,
)
from elastic.widths.operations.joining import broadcast
from elastic.widths.operations.shapes import reduce_over

LARGEST = "says which channel is the largest"
RANKS = "ranks its channels"


def find_extreme(tracker: Tracker, node: fx.Node) -> tuple[Axes, Axes] | Axes:
    """Follow max and min along one dimension, which also say where it lies, or of two tensors."""
    dim = get_argument(node, 1, "dim", "other")
    if isinstance(dim, fx.Node):
        return broadcast(tracker, node)
    x = get_axes(get_input(node))
    if dim is None:
        return reduce_over(tracker, node, x, None)
    if any(map(_asks_place, node.users)) and x[dim] is not None:
        tracker.fix([x[dim]], node, LARGEST)
    axes = reduce_over(tracker, node, x, dim, len(get_value(node)[0].shape))
    return axes, axes


def _asks_place(user: fx.Node) -> bool:
    """Tell whether a user of both results may read the places; what nothing reads, as a `_`, does not."""
    if user.op != "call_function":
        return True
    return bool(user.users) and user.args[1:] not in ((0,), ("values",))


def find_place(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow argmax and argmin: channels that they compare are numbered in the answer."""
    x, dim = get_axes(get_input(node)), get_argument(node, 1, "dim")
    tracker.fix(x if dim is None else [x[dim]], node, LARGEST)
    return reduce_over(tracker, node, x, dim)


def rank(tracker: Tracker, node: fx.Node) -> tuple[Axes, Axes] | Axes:
    """Follow sort, median, topk and their like along one dimension, by default the last one."""
    x, results = get_axes(get_input(node)), get_value(node)
    is_counted = get_operation_name(node) in ("topk", "kthvalue")  # they are told first how many, or which
    dim = get_argument(node, 1 + is_counted, "dim", default=-1) % len(x)
    is_single = isinstance(results, Tensor)
    ndim = len((results if is_single else results[0]).shape)
    if not ndim:  # a median of all entries
        tracker.fix(x, node, RANKS)
        return ()
    tracker.fix([x[dim]], node, RANKS)
    axes = (*x[:dim], *([None] if ndim == len(x) else []), *x[dim + 1 :])
    return axes if is_single else (axes, axes)
