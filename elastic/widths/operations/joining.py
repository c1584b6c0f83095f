"""Follow channels where several tensors meet: broadcasting and concatenation."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, fx
from torch.fx.node import map_arg

from elastic.widths.operations.counts import list_counts
from elastic.widths.operations.interface import (
    Axes,
    NotFollowed,
    Tracked,
    Tracker,
    get_argument,
    get_axes,
    get_input,
    get_operation_name,
    get_shape,
    get_value,
    list_tensors,
)
from elastic.widths.union import Axis

# The dimension along which they join tensors, where these have it.
STACKS = {"vstack": 0, "hstack": 1, "dstack": 2}


def broadcast(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow additions, multiplications and activations: dimensions are aligned at their ends, and agree."""
    return broadcast_to(tracker, node, get_shape(node))


def broadcast_each(tracker: Tracker, node: fx.Node) -> tuple[Axes, ...]:
    """Follow what broadcasts several tensors, and gives each of them."""
    values = get_value(node)
    return (broadcast_to(tracker, node, values[0].shape),) * len(values)


def broadcast_to(tracker: Tracker, node: fx.Node, shape: Sequence[int]) -> Axes:
    """Let the dimensions of all tensors that a node reads agree, aligned at their ends."""
    sources = list_tensors(node)
    y: list[Axis | None] = [None] * len(shape)
    for d in range(-len(shape), 0):
        ends = [
            (get_axes(source)[d], get_shape(source)[d]) for source in sources if len(get_axes(source)) >= -d
        ]
        tracker.fix([a for a, size in ends if size < shape[d]], node, "broadcasts one channel over many")
        # A dimension of size 1 without channels is broadcast, and says nothing.
        axes = [axis for axis, size in ends if size == shape[d] and (size > 1 or axis is not None)]
        for axis in axes[1:]:
            tracker.unite(axes[0], axis, node)
        y[d] = axes[0] if axes else None
    return tuple(y)


def scale(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow products and quotients; the number of channels may scale what is normalised over them."""
    sources = [source for source in node.all_input_nodes if "counts" in source.meta]
    axes = [axis for source in sources for count in list_counts(source) for axis in count.axes]
    tracker.fix(
        [axis for axis in axes if not tracker.is_mixed(axis)], node, "computes with the number of channels"
    )
    return broadcast(tracker, node)


def pass_on(tracker: Tracker, node: fx.Node) -> Tracked:
    """Follow what gives what it is given, which may be several tensors."""
    tracked: Tracked = map_arg(get_argument(node, 0, "input"), lambda source: source.meta["axes"])
    return tracked


def convert(tracker: Tracker, node: fx.Node) -> Axes | None:
    """Follow a change of type or device, which another tensor may say: what that one holds is not read.

    `x.type()` only names a type.
    """
    tracker.drop([axis for source in list_tensors(node) for axis in get_axes(source)])
    return get_axes(get_input(node)) if isinstance(get_value(node), Tensor) else None


def concatenate(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow tensors set side by side along one dimension; along the others they agree."""
    parts, shapes = _list_parts(node)
    y = list(parts[0])
    along = STACKS.get(get_operation_name(node), 0)
    if along >= len(y):
        raise NotFollowed("is given too few dimensions")
    dim = get_argument(node, 1, "dim", default=along) % len(y)
    for d in (d for d in range(len(y)) if d != dim):
        for axes in parts[1:]:
            if y[d] is not None or axes[d] is not None:
                tracker.unite(y[d], axes[d], node)
    ends = [axes[dim] for axes in parts]
    if any(axis is not None for axis in ends):
        y[dim] = np.concatenate(
            [
                begin_constant(tracker, node, shape[dim]) if axis is None else axis
                for shape, axis in zip(shapes, ends, strict=True)
            ]
        )
    return tuple(y)


def stack(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow tensors that are stacked along a new dimension, and agree along all others."""
    (first, *others), _ = _list_parts(node)
    for axes in others:
        for axis, other in zip(first, axes, strict=True):
            tracker.unite(axis, other, node)
    dim = get_argument(node, 1, "dim", default=0) % (len(first) + 1)
    return (*first[:dim], None, *first[dim:])


def hold(tracker: Tracker, node: fx.Node) -> tuple[Tracked, ...]:
    """Follow what holds outputs, a named tuple, say, whose tensors stay what they are."""
    return tuple(source.meta["axes"] for source in node.all_input_nodes)


def _list_parts(node: fx.Node) -> tuple[list[Axes], list[Sequence[int]]]:
    """List the axes and the shapes of the tensors that are joined: of several nodes, or of one's parts.

    Raises:
        NotFollowed: they are no tensors.
    """
    parts = get_argument(node, 0, "tensors")
    if isinstance(parts, tuple | list) and all(isinstance(part, fx.Node) for part in parts):
        return [get_axes(part) for part in parts], [get_shape(part) for part in parts]
    values = get_value(parts)
    if not isinstance(values, tuple | list) or not parts.meta["axes"]:
        raise NotFollowed("joins what is no list of tensors")
    return list(parts.meta["axes"]), [value.shape for value in values]


def begin_constant(tracker: Tracker, node: fx.Node, size: int) -> Axis:
    """Make an axis of what never changes (the model's input, say)."""
    axis = tracker.elements.new(size)
    tracker.fix([axis], node, "joins a part that never changes")
    return axis
