"""Follow channels where a tensor is cut: split, chunk, and indexing."""

import numpy as np
from torch import Tensor, fx

from elastic.widths.operations.interface import (
    Axes,
    NotFollowed,
    Tracked,
    Tracker,
    get_argument,
    get_axes,
    get_input,
    get_value,
)
from elastic.widths.union import Axis


def split(tracker: Tracker, node: fx.Node) -> tuple[Axes, ...]:
    """Follow a split into parts of a given size: a size that is a number fixes it."""
    sizes = get_argument(node, 1, "split_size_or_sections", "split_size")
    return _cut(tracker, node, is_constant=not isinstance(sizes, fx.Node))


def chunk(tracker: Tracker, node: fx.Node) -> tuple[Axes, ...]:
    """Follow a split into a given number of parts: equal parts stay equal."""
    return _cut(tracker, node, is_constant=False)


def _cut(tracker: Tracker, node: fx.Node, is_constant: bool) -> tuple[Axes, ...]:
    x = get_axes(get_input(node))
    dim = get_argument(node, 2, "dim", "axis", default=0) % len(x)
    sizes = [part.shape[dim] for part in get_value(node)]
    axis = x[dim]
    if axis is not None and (is_constant or len(set(sizes)) > 1):
        tracker.fix([axis], node, "fixes the number of channels")
    elif axis is not None:
        tracker.elements.tie(axis, len(sizes))
    ends = np.cumsum(sizes)
    parts = [None if axis is None else axis[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return tuple((*x[:dim], part, *x[dim + 1 :]) for part in parts)


def get_item(tracker: Tracker, node: fx.Node) -> Tracked:
    """Follow indexing of a tensor, or the choice of one of several tensors."""
    source, index = get_input(node), get_argument(node, 1, "index")
    if isinstance(get_value(source), Tensor):
        return _index(tracker, node, get_axes(source), index)
    parts: Tracked = source.meta["axes"]
    return parts[index] if parts and isinstance(index, int) else None  # type: ignore[return-value]


def _index(tracker: Tracker, node: fx.Node, x: Axes, index: object) -> Axes:
    """Follow slices, new dimensions, an ellipsis, and single places, which go."""
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        place = items.index(Ellipsis)
        taken = len(items) - 1 - items.count(None)
        items[place : place + 1] = [slice(None)] * (len(x) - taken)
    y: list[Axis | None] = []
    rest = iter(x)
    for item in items:
        if item is None:
            y.append(None)
        elif isinstance(item, slice):
            y.append(_slice(tracker, node, next(rest), item))
        elif type(get_value(item)) is int:
            tracker.fix([next(rest)], node, "picks single channels")
        else:
            raise NotFollowed("picks entries by a list")
    return (*y, *rest)


def _slice(tracker: Tracker, node: fx.Node, axis: Axis | None, item: slice) -> Axis | None:
    """Follow a slice: a whole dimension, or one of equal parts computed from its size; else it is fixed."""
    if axis is None or item == slice(None):
        return axis
    start, stop, step = (get_value(bound) for bound in (item.start, item.stop, item.step))
    part = axis[start:stop:step]
    is_constant = any(isinstance(bound, int) and bound for bound in (item.start, item.stop))
    is_part = len(part) and len(axis) % len(part) == 0 and (start or 0) % len(part) == 0
    if is_constant or step not in (None, 1) or not is_part:
        tracker.fix([axis], node, "fixes the number of channels")
    else:
        tracker.elements.tie(axis, len(axis) // len(part))
    return part
