"""Follow channels where a tensor is cut: split, chunk, and indexing.

A cut at a place that is written as a number fixes the channels; one that is computed from theirs is followed.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from elastic.widths.operations.counts import Count, get_count, list_counts
from elastic.widths.operations.interface import (
    Axes,
    NotFollowed,
    Tracked,
    Tracker,
    get_argument,
    get_axes,
    get_input,
    get_shape,
    get_value,
    list_axes,
)
from elastic.widths.operations.reshaping import agree
from elastic.widths.tracing.sizes import SizeAttribute
from elastic.widths.union import Axis


def split(tracker: Tracker, node: fx.Node) -> tuple[Axes, ...]:
    """Follow a split into parts of given sizes."""
    x, dim, lengths = _read_parts(node)
    sizes = get_argument(node, 1, "split_size_or_sections", "split_size", "split_sizes")
    parts = _set_side_by_side(x, dim, lengths)
    sections = sizes if isinstance(sizes, tuple | list) else [sizes]
    if any(isinstance(size, SizeAttribute) for size in sections):
        if cut := [axis for part in parts if (axis := part[dim]) is not None]:  # all or none
            _let_sizes_follow(tracker, node, sizes, cut)
        return parts
    counts = list_counts(sizes)
    if isinstance(get_value(sizes), int):  # of every part, but the last takes what is left
        counts = counts * (len(lengths) - 1)
    places = list(accumulate(lengths))[: len(counts)]
    _cut(tracker, node, x[dim], list(zip(places, accumulate(counts), strict=True)))
    return parts


def _let_sizes_follow(tracker: Tracker, node: fx.Node, sizes: object, parts: Sequence[Axis]) -> None:
    """Let the numbers that a split is given follow its parts; a part whose number cannot is fixed."""
    if isinstance(sizes, int):
        if any(len(part) != sizes for part in parts):
            tracker.fix(parts, node, "fixes the number of channels")
            return
        tracker.elements.tie_parts(parts)
        sizes, parts = [sizes], parts[:1]
    for size, part in zip(sizes, parts, strict=True):  # type: ignore[call-overload]
        if not tracker.follow_size(size, part):
            count = get_count(size)
            if not count.counts(part, tracker.elements):
                tracker.fix([part, *count.axes], node, "fixes the number of channels")


def chunk(tracker: Tracker, node: fx.Node) -> tuple[Axes, ...]:
    """Follow a split into a given number of parts: equal parts stay equal."""
    x, dim, lengths = _read_parts(node)
    axis = x[dim]
    is_number = isinstance(get_argument(node, 1, "chunks", "sections", "indices_or_sections"), int)
    if len(set(lengths)) > 1 or not is_number:
        tracker.fix([axis], node, "fixes the number of channels")
    elif axis is not None:
        tracker.elements.tie(axis, len(lengths))
    return _set_side_by_side(x, dim, lengths)


def unbind(tracker: Tracker, node: fx.Node) -> tuple[Axes, ...]:
    """Follow a tensor that is taken apart along one dimension."""
    x = get_axes(get_input(node))
    dim = get_argument(node, 1, "dim", default=0) % len(x)
    tracker.fix([x[dim]], node, "picks single channels")
    return ((*x[:dim], *x[dim + 1 :]),) * len(get_value(node))


def gate_linearly(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow GLU: one half of the channels gates the other."""
    x = get_axes(get_input(node))
    is_layer = node.op == "call_module"
    dim = tracker.get_layer(node, nn.GLU).dim if is_layer else get_argument(node, 1, "dim", default=-1)
    axis, dim = x[dim], dim % len(x)
    return (*x[:dim], None if axis is None else tracker.elements.tie(axis, 2), *x[dim + 1 :])


def get_item(tracker: Tracker, node: fx.Node) -> Tracked:
    """Follow indexing of a tensor, or the choice of one of several tensors."""
    source, index = get_input(node), get_argument(node, 1, "index")
    parts: Any = source.meta["axes"]
    if not isinstance(get_value(source), Tensor) and parts and not isinstance(index, int | slice):
        raise NotFollowed("is given another place than a number")
    tracker.drop(list_axes(parts))  # what is not picked is not read here
    if isinstance(get_value(source), Tensor):
        return _index(tracker, node, parts or (), index)
    part: Tracked = parts[index] if parts else None
    return part


def set_item(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow what is written into a part of a tensor: its channels are those of the part."""
    _, index, value = node.args
    axes = get_axes(get_input(node))
    if isinstance(index, fx.Node) and getattr(get_value(index), "dtype", None) == torch.bool:
        return _write_where(tracker, node, axes, index, value)
    part = _index(tracker, node, axes, index)
    tracker.drop([*axes, *part])
    if isinstance(value, fx.Node):
        own, shape = get_axes(value), get_shape(value)
        for axis, other, size in zip(reversed(part), reversed(own), reversed(shape), strict=False):
            if size > 1 and (axis is not None or other is not None):
                tracker.unite(axis, other, node)
            else:
                tracker.fix([other], node, "broadcasts one channel over many")
    return ()


def _write_where(tracker: Tracker, node: fx.Node, axes: Axes, mask: fx.Node, value: object) -> Axes:
    """Follow one value that is written wherever a mask has it: `x[x < 0] = 0`."""
    if isinstance(value, fx.Node) and get_shape(value):
        raise NotFollowed("writes a list of entries")
    own = get_axes(mask)
    tracker.drop([*axes, *own])
    for axis, other in zip(axes, own, strict=False):
        if axis is not None or other is not None:
            tracker.unite(axis, other, node)
    return ()


def pick(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow select: one place along a dimension, which goes."""
    x, dim = get_axes(get_input(node)), get_argument(node, 1, "dim")
    tracker.fix([x[dim]], node, "picks single channels")
    return (*x[: dim % len(x)], *x[dim % len(x) + 1 :])


def narrow(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow narrow: a run along a dimension, which leaves channels alone or fixes them."""
    x, dim = get_axes(get_input(node)), get_argument(node, 1, "dim")
    tracker.fix([x[dim]], node, "fixes the number of channels")
    return (*x[: dim % len(x)], None, *x[dim % len(x) + 1 :])


def select(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow index_select: entries are picked along one dimension, which may not be that of channels."""
    x, dim = get_axes(get_input(node)), get_argument(node, 1, "dim")
    tracker.fix([x[dim]], node, "picks channels by a list")
    return (*x[: dim % len(x)], None, *x[dim % len(x) + 1 :])


def _read_parts(node: fx.Node) -> tuple[Axes, int, list[int]]:
    """Read the axes of what is split, the dimension, and the length of each part."""
    x = get_axes(get_input(node))
    dim = get_argument(node, 2, "dim", default=0) % len(x)
    return x, dim, [part.shape[dim] for part in get_value(node)]


def gather(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow what takes entries along one dimension; along the others an index has the tensor's channels."""
    source, index = get_input(node), get_argument(node, 2, "index")
    x, own = get_axes(source), get_axes(index)
    dim = get_argument(node, 1, "dim") % len(x)
    tracker.fix([x[dim], own[dim]], node, "picks channels by a list")
    y: list[Axis | None] = []
    for d, (axis, other) in enumerate(zip(x, own, strict=True)):
        if d == dim or (axis is None and other is None):
            y.append(None)
        elif get_shape(source)[d] != get_shape(index)[d]:
            tracker.fix([axis, other], node, "fixes the number of channels")
            y.append(None)
        else:
            tracker.unite(axis, other, node)
            y.append(axis if axis is not None else other)
    return tuple(y)


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
        dims = len(items) - 1 - items.count(None)
        items[place : place + 1] = [slice(None)] * (len(x) - dims)
    y: list[Axis | None] = []
    remaining, has_list = iter(x), False
    for item in items:
        if item is None:
            y.append(None)
        elif isinstance(item, slice):
            y.append(_slice(tracker, node, next(remaining), item))
        elif isinstance(get_value(item), int):
            tracker.fix([next(remaining)], node, "picks single channels")
        elif isinstance(value := get_value(item), Tensor) and value.dtype != torch.bool and not has_list:
            has_list = True
            tracker.fix([next(remaining)], node, "picks channels by a list")
            y += [None] * value.dim()
        else:
            raise NotFollowed("picks entries by a list")
    return (*y, *remaining)


def _slice(tracker: Tracker, node: fx.Node, axis: Axis | None, item: slice) -> Axis | None:
    """Follow a slice of a dimension, between places that are computed from its size."""
    start, stop, step = (get_value(bound) for bound in (item.start, item.stop, item.step))
    if axis is None or (start, stop, step) == (None, None, None):
        return axis
    bounds = [bound for bound in (item.start, item.stop) if bound is not None and get_value(bound) != 0]
    if step in (None, 1) and any(isinstance(bound, SizeAttribute) for bound in bounds):
        if not all(tracker.follow_size(bound, axis[: get_value(bound)]) for bound in bounds):
            tracker.fix([axis], node, "fixes the number of channels")
    elif isinstance(item.step, int) and _is_interleaved(axis, item):
        tracker.elements.tie_parts([axis[place::step] for place in range(step)])
    elif step not in (None, 1) or min(start or 0, stop or 0) < 0:
        tracker.fix([axis], node, "fixes the number of channels")
    else:
        places = [(place, get_count(place)) for place in (item.start, item.stop) if place is not None]
        _cut(tracker, node, axis, [(get_value(place), count) for place, count in places])
    return axis[start:stop:step]


def _is_interleaved(axis: Axis, item: slice) -> bool:
    """Tell whether a slice takes one of each n channels, of which there is a multiple."""
    start = 0 if item.start is None else item.start
    is_whole = item.stop is None and item.step > 1 and len(axis) % item.step == 0
    return is_whole and isinstance(start, int) and 0 <= start < item.step


def _cut(tracker: Tracker, node: fx.Node, axis: Axis | None, places: Sequence[tuple[int, Count]]) -> None:
    """Let cuts follow the channels before them, or fix the channels where they do not.

    The longest equal parts that all cuts lie between are tied: only so do the cuts stay at the same fraction
    of the channels. A cut that counts others' channels lets those before it agree with them.
    """
    if axis is None or not len(axis):
        return
    if all(count.terms or place == 0 for place, count in places):
        unit = gcd(len(axis), *(min(place, len(axis)) for place, _ in places))
        tracker.elements.tie(axis, len(axis) // unit)
    if not all(
        count.counts(axis[:place], tracker.elements) or agree(tracker, axis[:place], count, np.tile)
        for place, count in places
    ):
        tracker.fix(
            [axis, *(a for _, count in places for a in count.axes)], node, "fixes the number of channels"
        )
