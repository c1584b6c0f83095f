"""Follow channels through view, reshape, flatten and unflatten.

A size written as a number fixes the channels it counts; a size computed from these channels' number, or -1,
follows them. One axis may be cut by constant factors (channel shuffle): the cuts change alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

import numpy as np
from torch import fx, nn

from elastic.widths.operations.counts import Count, Counts, count_axis, get_counts
from elastic.widths.operations.interface import (
    Axes,
    NotFollowed,
    Tracker,
    get_argument,
    get_axes,
    get_input,
    get_shape,
    get_value,
    list_arguments,
)
from elastic.widths.tracing.sizes import AttributePlace, SizeAttribute
from elastic.widths.union import Axis

FIXES = "fixes the number of channels"


@dataclass(frozen=True)
class Run:
    """Pair neighbouring dimensions before with those after that hold the same entries."""

    before: range
    after: range


def flatten(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow flattening: each dimension takes what it needs."""
    return _carry_runs(tracker, node, [None] * len(get_shape(node)))


def unflatten(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow unflattening: one dimension is given sizes, the others stay.

    A layer's first size follows the channels, as in `nn.Unflatten(1, (8, 4, 4))`, if none takes what is left.
    """
    if node.op == "call_module":
        layer = tracker.get_layer(node, nn.Unflatten)
        dim, sizes = layer.dim, layer.unflattened_size
    else:
        dim, sizes = get_argument(node, 1, "dim"), get_argument(node, 2, "sizes")
    if not isinstance(dim, int):
        raise NotFollowed("names its dimensions")
    counts = _read_sizes(get_counts(sizes))
    numbers = list(sizes) if isinstance(sizes, tuple | list) else [None] * len(counts)
    if node.op == "call_module":
        numbers[0] = SizeAttribute(numbers[0], AttributePlace(str(node.target), "unflattened_size", 0))
    others: list[None] = [None] * len(get_shape(get_input(node)))
    dim %= len(others)
    before, after = others[:dim], others[dim + 1 :]
    return _carry_runs(tracker, node, [*before, *counts, *after], [*before, *numbers, *after])


def reshape(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a view or a reshape: sizes are given one by one, or as another's shape."""
    sizes = get_argument(node, 1, "shape", "size")
    if not isinstance(get_value(sizes), tuple | list):
        sizes = list_arguments(node, 1)
    counts = _read_sizes(get_counts(sizes))
    if len(counts) != len(get_shape(node)):
        raise NotFollowed("is given no sizes")  # but another type of numbers, say
    return _carry_runs(tracker, node, counts, sizes if isinstance(sizes, tuple | list) else ())


def reshape_as(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a reshape to another tensor's shape."""
    other = get_argument(node, 1, "other")
    tracker.drop(get_axes(other))
    pairs = zip(get_axes(other), get_shape(other), strict=True)
    return _carry_runs(tracker, node, [count_axis(axis, size) for axis, size in pairs])


def _read_sizes(counts: Counts) -> list[Count | None]:
    """Read sizes; None stands for -1, which takes what the others leave."""
    sizes = [counts] if isinstance(counts, Count) else counts
    return [None if not count.terms and count.constant == -1 else count for count in sizes]


def _carry_runs(
    tracker: Tracker, node: fx.Node, sizes: Sequence[Count | None], numbers: Sequence[object] = ()
) -> Axes:
    """Carry each run of dimensions on its own to the given sizes, which are numbers, or computed."""
    source = get_input(node)
    x, before, after = get_axes(source), get_shape(source), get_shape(node)
    if 0 in before:
        raise NotFollowed("has no entries")
    y: list[Axis | None] = [None] * len(after)
    for run in pair_runs(before, after):
        axes = [x[d] for d in run.before]
        if all(axis is None for axis in axes):
            continue
        if len(run.after) == 1:
            axes = _keep_first(tracker, node, axes)
        merged = merge_axes(axes, [before[d] for d in run.before])
        target = _find_target(run, after, sizes, merged)
        attribute = _find_attribute(run, numbers) if target is None else None
        place = attribute if target is None else target
        if merged is None or place is None:
            is_flat = len(after) == 2 and before[0] == after[0]
            tracker.fix(axes, node, f"{FIXES}: x.flatten(1) would not" if is_flat else FIXES)
            continue
        y[place] = _cut(tracker, merged, [after[d] for d in run.after], place - run.after.start)
        if attribute is not None and not tracker.follow_size(numbers[attribute], y[attribute]):
            tracker.fix(axes, node, FIXES)
    for axis, size, number in zip_longest(y, sizes, numbers):
        if size is None or not (size.terms or (axis is not None and not isinstance(number, SizeAttribute))):
            continue
        if not size.counts(axis, tracker.elements) and not agree(tracker, axis, size):
            tracker.fix([axis, *size.axes], node, "is given a size that counts other channels")
    return tuple(y)


def _keep_first(tracker: Tracker, node: fx.Node, axes: Sequence[Axis | None]) -> list[Axis | None]:
    """Let the first of several axes that become one go on, and fix the others, as those of a kernel."""
    first = next(d for d, axis in enumerate(axes) if axis is not None)
    tracker.fix(axes[first + 1 :], node, FIXES)
    return [axis if d == first else None for d, axis in enumerate(axes)]


def _find_target(
    run: Run, after: Sequence[int], sizes: Sequence[Count | None], merged: Axis | None
) -> int | None:
    """Find the one dimension after that can follow the channels.

    It is the one whose size is computed from channels, or else the one that takes what the others leave; of
    those of size 1 the first will do, where there is but a single channel.
    """
    computed = [d for d in run.after if (size := sizes[d]) is not None and size.terms]
    candidates = computed or [d for d in run.after if sizes[d] is None]
    longer = [d for d in candidates if after[d] > 1]
    if not longer and merged is not None and merged.size == 1:
        return next(iter(candidates), None)
    return longer[0] if len(longer) == 1 else None


def _find_attribute(run: Run, numbers: Sequence[object]) -> int | None:
    """Find the dimension after whose size is an attribute: of several the last, as in `(heads, size)`.

    Of those of an image, `view(-1, channels, *size)`, it is the first.
    """
    places = [d for d in run.after if numbers and isinstance(numbers[d], SizeAttribute)]
    is_image = run.after == range(1, len(numbers)) and len(run.after) > 2
    return (places[0] if is_image else places[-1]) if places else None


def agree(
    tracker: Tracker, axis: Axis | None, size: Count, multiply: Callable[[Axis, int], Axis] = np.repeat
) -> bool:
    """Let channels agree with others whose number they are given as their size; False where they cannot.

    Args:
        multiply: how a multiple of these lies: each channel several times, or all of them (`np.tile`).
    """
    if axis is None or not size.is_linear or size.constant or len(size.terms) != 1:
        return False
    factor, counted_axis = size.terms[0]
    if len(axis) != factor * len(counted_axis) or len(counted_axis) % factor.denominator:
        return False
    part = tracker.elements.tie(counted_axis, factor.denominator)
    tracker.elements.unite(axis, multiply(part, factor.numerator))
    return True


def _cut(tracker: Tracker, merged: Axis, sizes: Sequence[int], target: int) -> Axis:
    """Cut an axis into dimensions, of which the others are constant: what lies along them changes alike."""
    last = np.moveaxis(merged.reshape(sizes), target, -1)
    return tracker.elements.tie(last.reshape(-1), last.size // sizes[target])


def merge_axes(axes: Sequence[Axis | None], sizes: Sequence[int]) -> Axis | None:
    """Flatten dimensions together: the axis of the result, or None where two of them hold channels."""
    dims = [d for d, axis in enumerate(axes) if axis is not None]
    if len(dims) != 1:
        return None
    axis = axes[dims[0]]
    assert axis is not None
    # Each channel stands as often as the dimensions after it have entries, all that as often as those before.
    return np.tile(np.repeat(axis, prod(sizes[dims[0] + 1 :])), prod(sizes[: dims[0]]))


def pair_runs(before: Sequence[int], after: Sequence[int]) -> list[Run]:
    """Pair the shortest runs of dimensions whose sizes multiply to the same number.

    Entries keep their order, so both shapes can be cut wherever the products up to there agree. Dimensions of
    size 1 at the end belong to the last run.
    """
    runs: list[Run] = []
    i = j = 0
    while i < len(before) and j < len(after):
        first_i, first_j = i, j
        product_i, product_j = before[i], after[j]
        i, j = i + 1, j + 1
        while product_i != product_j:  # the shorter product takes one more dimension
            if product_i < product_j:
                product_i, i = product_i * before[i], i + 1
            else:
                product_j, j = product_j * after[j], j + 1
        runs.append(Run(range(first_i, i), range(first_j, j)))
    if runs:
        runs[-1] = Run(range(runs[-1].before.start, len(before)), range(runs[-1].after.start, len(after)))
    return runs
