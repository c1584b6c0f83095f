"""Follow channels where a tensor is cut: split, chunk, and indexing.

A cut at a place that is written as a number fixes the channels; one that is computed from theirs is followed.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import gcd

from torch import Tensor, fx

from elastic.widths.operations.counts import Count, get_count, list_counts
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
    """Follow a split into parts of given sizes."""
    x, dim, lengths = _read_parts(node)
    sizes = get_argument(node, 1, "split_size_or_sections", "split_size")
    counts = list_counts(sizes)
    if isinstance(get_value(sizes), int):  # of every part, but the last takes what is left
        counts = counts * (len(lengths) - 1)
    places = list(accumulate(lengths))[: len(counts)]
    _cut(tracker, node, x[dim], list(zip(places, accumulate(counts), strict=True)))
    return _set_side_by_side(x, dim, lengths)


def chunk(tracker: Tracker, node: fx.Node) -> tuple[Axes, ...]:
    """Follow a split into a given number of parts: equal parts stay equal."""
    x, dim, lengths = _read_parts(node)
    axis = x[dim]
    if len(set(lengths)) > 1:
        tracker.fix([axis], node, "fixes the number of channels")
    elif axis is not None:
        tracker.elements.tie(axis, len(lengths))
    return _set_side_by_side(x, dim, lengths)


def get_item(tracker: Tracker, node: fx.Node) -> Tracked:
    """Follow indexing of a tensor, or the choice of one of several tensors."""
    source, index = get_input(node), get_argument(node, 1, "index")
    if isinstance(get_value(source), Tensor):
        return _index(tracker, node, get_axes(source), index)
    parts: Tracked = source.meta["axes"]
    return parts[index] if parts and isinstance(index, int) else None  # type: ignore[return-value]


def _read_parts(node: fx.Node) -> tuple[Axes, int, list[int]]:
    """Read the axes of what is split, the dimension, and the length of each part."""
    x = get_axes(get_input(node))
    dim = get_argument(node, 2, "dim", "axis", default=0) % len(x)
    return x, dim, [part.shape[dim] for part in get_value(node)]


def _set_side_by_side(x: Axes, dim: int, lengths: Sequence[int]) -> tuple[Axes, ...]:
    """Give the axes of each part, of the given length along a dimension."""
    axis = x[dim]
    bounds = pairwise([0, *accumulate(lengths)])
    parts = [None if axis is None else axis[start:stop] for start, stop in bounds]
    return tuple((*x[:dim], part, *x[dim + 1 :]) for part in parts)


def _index(tracker: Tracker, node: fx.Node, x: Axes, index: object) -> Axes:
    """Follow slices, new dimensions, an ellipsis, and single places, which go."""
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        place = items.index(Ellipsis)
        indexed = len(items) - 1 - items.count(None)
        items[place : place + 1] = [slice(None)] * (len(x) - indexed)
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
    """Follow a slice of a dimension, between places that are computed from its size."""
    start, stop, step = (get_value(bound) for bound in (item.start, item.stop, item.step))
    if axis is None or (start, stop, step) == (None, None, None):
        return axis
    if step not in (None, 1) or min(start or 0, stop or 0) < 0:
        tracker.fix([axis], node, "fixes the number of channels")
    else:
        places = [(place, get_count(place)) for place in (item.start, item.stop) if place is not None]
        _cut(tracker, node, axis, [(get_value(place), count) for place, count in places])
    return axis[start:stop:step]


def _cut(tracker: Tracker, node: fx.Node, axis: Axis | None, places: Sequence[tuple[int, Count]]) -> None:
    """Let cuts follow the channels before them, or fix the channels where they do not.

    The longest equal parts that all cuts lie between are tied: only so do the cuts stay at the same fraction
    of the channels.
    """
    if axis is None or not len(axis):
        return
    if all(count.terms or place == 0 for place, count in places):
        unit = gcd(len(axis), *(min(place, len(axis)) for place, _ in places))
        tracker.elements.tie(axis, len(axis) // unit)
    if not all(count.counts(axis[:place], tracker.elements) for place, count in places):
        tracker.fix(
            [axis, *(a for _, count in places for a in count.axes)], node, "fixes the number of channels"
        )
