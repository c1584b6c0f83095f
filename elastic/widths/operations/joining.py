"""Follow channels where several tensors meet: broadcasting and concatenation."""

import numpy as np
from torch import fx

from elastic.widths.operations.interface import (
    Axes,
    NotFollowed,
    Tracker,
    get_argument,
    get_axes,
    get_shape,
    list_tensors,
)
from elastic.widths.union import Axis


def broadcast(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow additions, multiplications and activations: dimensions are aligned at their ends, and agree."""
    shape, sources = get_shape(node), list_tensors(node)
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


def concatenate(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow tensors set side by side along one dimension; along the others they agree."""
    parts = get_argument(node, 0, "tensors")
    if not isinstance(parts, tuple | list):
        raise NotFollowed("joins what is no list of tensors")
    y = list(get_axes(parts[0]))
    dim = get_argument(node, 1, "dim", "axis", default=0) % len(y)
    for d in (d for d in range(len(y)) if d != dim):
        for part in parts[1:]:
            if y[d] is not None or get_axes(part)[d] is not None:
                tracker.unite(y[d], get_axes(part)[d], node)
    ends = [get_axes(part)[dim] for part in parts]
    if any(axis is not None for axis in ends):
        y[dim] = np.concatenate(
            [
                _begin_constant(tracker, node, get_shape(part)[dim]) if axis is None else axis
                for part, axis in zip(parts, ends, strict=True)
            ]
        )
    return tuple(y)


def stack(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow tensors that are stacked along a new dimension, and agree along all others."""
    parts = get_argument(node, 0, "tensors")
    if not isinstance(parts, tuple | list):
        raise NotFollowed("joins what is no list of tensors")
    first, *others = map(get_axes, parts)
    for axes in others:
        for axis, other in zip(first, axes, strict=True):
            if axis is not None or other is not None:
                tracker.unite(axis, other, node)
    dim = get_argument(node, 1, "dim", "axis", default=0) % (len(first) + 1)
    return (*first[:dim], None, *first[dim:])


def _begin_constant(tracker: Tracker, node: fx.Node, size: int) -> Axis:
    """Make an axis of what never changes (the model's input, say)."""
    axis = tracker.elements.new(size)
    tracker.fix([axis], node, "joins a part that never changes")
    return axis
