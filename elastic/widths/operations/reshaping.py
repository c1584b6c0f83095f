"""Follow channels through view, reshape, flatten and unflatten.

A size written as a number fixes the channels it counts; a size computed from a tensor's own shape, or -1,
follows them. One axis may be cut by constant factors (channel shuffle): the cuts change alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import fx

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
from elastic.widths.union import Axis


@dataclass(frozen=True)
class Run:
    """Pair neighbouring dimensions before with those after that hold the same entries."""

    before: range
    after: range


def flatten(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow flattening: the one dimension that it makes takes what it needs."""
    return _carry_runs(tracker, node, frozenset(range(len(get_shape(node)))))


def unflatten(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow unflattening: its sizes are numbers."""
    return _carry_runs(tracker, node, frozenset())


def reshape(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a view or a reshape: sizes are given one by one, or as another's shape."""
    sizes = get_argument(node, 1, "shape", "size")
    if isinstance(get_value(sizes), torch.Size):
        computed = [isinstance(sizes, fx.Node)] * len(get_shape(node))
    else:
        listed = list_arguments(node, 1, "shape", "size")
        computed = [isinstance(size, fx.Node) or size == -1 for size in listed]
        if len(computed) != len(get_shape(node)):
            raise NotFollowed("is given no sizes")  # another type of numbers, say
    return _carry_runs(tracker, node, frozenset(d for d, free in enumerate(computed) if free))


def _carry_runs(tracker: Tracker, node: fx.Node, free: frozenset[int]) -> Axes:
    """Carry each run of dimensions on its own; `free` dimensions of the output follow the channels."""
    source = get_input(node)
    x, before, after = get_axes(source), get_shape(source), get_shape(node)
    if 0 in before:
        raise NotFollowed("has no entries")
    y: list[Axis | None] = [None] * len(after)
    for run in pair_runs(before, after):
        axes = [x[d] for d in run.before]
        if all(axis is None for axis in axes):
            continue
        merged = merge_axes(axes, [before[d] for d in run.before])
        target = _find_target(run, after, free, merged)
        if merged is None or target is None:
            tracker.fix(axes, node, "fixes the number of channels")
        else:
            y[target] = _cut(tracker, merged, [after[d] for d in run.after], target - run.after.start)
    return tuple(y)


def _find_target(run: Run, after: Sequence[int], free: frozenset[int], merged: Axis | None) -> int | None:
    """Find the one dimension after that can follow the channels: free, and the only such that is not 1."""
    candidates = [d for d in run.after if d in free]
    longer = [d for d in candidates if after[d] > 1]
    if not longer and merged is not None and merged.size == 1:  # a single channel: the first will do
        return next(iter(candidates), None)
    return longer[0] if len(longer) == 1 else None


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
