"""Follow tensors that are made in a forward: of one value everywhere, or a copy of channels."""

import operator
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor, fx

from elastic.widths.operations.counts import Count, get_count, get_counts, list_counts
from elastic.widths.operations.interface import (
    Axes,
    NotFollowed,
    Tracker,
    get_argument,
    get_axes,
    get_input,
    get_operation_name,
    get_shape,
    list_arguments,
)
from elastic.widths.tracing.sizes import SizeAttribute
from elastic.widths.union import Axis

MANY = 2**31 - 1
DECIDES = "decides by the number of channels"
COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)


def fill(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow `torch.ones`, `x.new_zeros` and their like: a size that counts channels follows them."""
    is_like = node.op == "call_method"
    if is_like:
        tracker.drop(get_axes(get_input(node)))
    sizes = _list_fill_sizes(tracker, node, int(is_like))
    counts = _list_counts(sizes)
    shape = get_shape(node)
    if len(counts) != len(shape):
        tracker.fix([a for count in counts for a in count.axes], node, "computes with the number of channels")
        return (None,) * len(shape)
    if len(sizes) != len(counts):  # of a shape
        return tuple(_follow_count(tracker, node, count) for count in counts)
    return tuple(_follow_size(tracker, node, size, count) for size, count in zip(sizes, counts, strict=True))


def _list_fill_sizes(tracker: Tracker, node: fx.Node, position: int) -> list[object]:
    """List the sizes of what is made, and fix the channels that the value counts which fills it."""
    if not get_operation_name(node).endswith("full"):
        return list_arguments(node, position, "size")
    value, size = get_argument(node, position + 1, "fill_value"), get_argument(node, position, "size")
    tracker.fix(get_count(value).axes, node, "computes with the number of channels")
    return list(size) if isinstance(size, tuple | list) else [size]


def copy_tensor(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow `torch.as_tensor` of a tensor."""
    source = get_argument(node, 0, "data", "obj")
    if not isinstance(source, fx.Node) or not isinstance(source.meta["value"], Tensor):
        raise NotFollowed("is given no tensor")
    return get_axes(source)


def hold_values(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow `x.new_tensor`: x tells a type alone."""
    tracker.drop(get_axes(get_input(node)))
    return (None,) * len(get_shape(node))


def make_grid(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow `affine_grid`: places in an image of a size, of which the number of channels does not matter."""
    tracker.fix(get_axes(get_input(node)), node, "reads channels as coordinates")
    counts = _list_counts(list_arguments(node, 1, "size"))
    axes = [axis for count in (*counts[:1], *counts[2:]) for axis in count.axes]
    tracker.fix(axes, node, "computes with the number of channels")
    return (None,) * len(get_shape(node))


def fill_like(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow `torch.zeros_like` and its like, and what is filled in place."""
    return get_axes(get_input(node))


def expand(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow dimensions of size 1 that are repeated to given sizes; all others keep theirs."""
    source = get_input(node)
    x, before, after = get_axes(source), get_shape(source), get_shape(node)
    sizes = list_arguments(node, 1, "size", "sizes")
    if len(sizes) == 1 and isinstance(sizes[0], fx.Node) and len(after) > 1:  # a shape
        sizes = [*get_counts(sizes[0])]  # type: ignore[misc]
    if len(sizes) != len(after):
        raise NotFollowed("is given sizes in a way of its own")
    y: list[Axis | None] = []
    offset = len(after) - len(before)
    for d, (size, count) in enumerate(zip(sizes, _list_counts(sizes), strict=True)):
        own = x[d - offset] if d >= offset else None
        if d >= offset and before[d - offset] == after[d]:
            is_kept = own is None or (count.constant == -1 and not count.terms)
            if not is_kept and not count.counts(own, tracker.elements) and not tracker.follow_size(size, own):
                tracker.fix([own, *count.axes], node, "fixes the number of channels")
            y.append(own)
        else:
            tracker.fix([own], node, "broadcasts one channel over many")
            y.append(_follow_size(tracker, node, size, count))
    return tuple(y)


def repeat_entries(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow repeat_interleave: each entry along a dimension comes a number of times."""
    x, times, dim = get_axes(get_input(node)), get_argument(node, 1, "repeats"), get_argument(node, 2, "dim")
    if not isinstance(times, int) or dim is None:
        raise NotFollowed("repeats all entries, or each as often as a tensor says")
    axis, dim = x[dim], dim % len(x)
    return (*x[:dim], None if axis is None else np.repeat(axis, times), *x[dim + 1 :])


def repeat(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a tensor set side by side with itself: each channel comes again, in turns."""
    source = get_input(node)
    x, before, after = get_axes(source), get_shape(source), get_shape(node)
    times = list_arguments(node, 1, "repeats", "dims")
    if len(times) > len(after) or not all(isinstance(n, int | fx.Node) for n in times):
        raise NotFollowed("is given numbers in a way of its own")
    times = [*[1] * (len(after) - len(times)), *times]  # tile may be given fewer
    offset = len(after) - len(x)
    axes, single = [*[None] * offset, *x], [*[True] * offset, *(size == 1 for size in before)]
    y: list[Axis | None] = []
    for axis, is_single, number, count in zip(axes, single, times, _list_counts(times), strict=True):
        if axis is None and is_single:
            y.append(_follow_size(tracker, node, number, count))
        else:
            tracker.fix(count.axes, node, "computes with the number of channels")
            y.append(None if axis is None else np.tile(axis, int(count.value)))
    return tuple(y)


def decide(tracker: Tracker, node: fx.Node) -> None:
    """Fix the channels whose number decides which way the forward goes, unless it stays as it is."""
    question = node.args[0] if node.args else node.kwargs["condition"]
    assert isinstance(question, fx.Node)
    answer = get_argument(node, 1, "message") is not False  # an assertion, which has a message, wants it true
    if not (
        _is_decided(question)
        or _stays_equal(tracker, question, answer)
        or _stays_divisible(tracker, question, answer)
        or _stays_unequal(tracker, question, answer)
    ):
        axes = [axis for count in list_counts(question) for axis in count.axes]
        tracker.fix(axes, question, DECIDES)


def _is_decided(question: fx.Node) -> bool:
    """Tell whether a comparison has one answer for any channels, of which there is at least one: `C != 0`.

    So has one with a number that no map's entries come to, as for where torch counts them in 32 bits, and one
    of shapes that differ in what is no channels.
    """
    if question.target not in COMPARISONS:
        return False
    if question.target in (operator.eq, operator.ne) and _differ(*map(list_counts, question.args)):
        return True
    ours, theirs = map(get_count, question.args)
    difference = ours + theirs.scale(Fraction(-1))
    factors = [factor for factor, _ in difference.terms]
    nearest = difference.constant + sum(factors)
    if not difference.is_linear or not factors:
        return False
    if abs(difference.constant) >= MANY:
        return True
    if min(factors) > 0:
        return nearest > 0 or (nearest == 0 and question.target in (operator.ge, operator.lt))
    return max(factors) < 0 and (
        nearest < 0 or (nearest == 0 and question.target in (operator.le, operator.gt))
    )


def _differ(ours: list[Count], theirs: list[Count]) -> bool:
    """Tell whether two shapes are unlike whatever their channels are."""
    pairs = zip(ours, theirs, strict=False)
    constants = [(a, b) for a, b in pairs if a.is_linear and b.is_linear and not (a.terms or b.terms)]
    return len(ours) != len(theirs) or any(a.constant != b.constant for a, b in constants)


def _stays_equal(tracker: Tracker, question: fx.Node, answer: bool) -> bool:
    """Tell whether numbers, or shapes, that are found equal can be kept so, and see to it."""
    if question.target is not (operator.eq if answer else operator.ne):
        return False
    ours, theirs = map(_list_numbers, question.args)
    are_equal = [_keep_equal(tracker, question, *pair) for pair in zip(ours, theirs, strict=False)]
    return len(ours) == len(theirs) and all(are_equal)


def _stays_unequal(tracker: Tracker, question: fx.Node, answer: bool) -> bool:
    """Tell whether a number of a shape can be kept unlike one that no channels change, and see to it."""
    if question.target is not (operator.ne if answer else operator.eq):
        return False
    for ours, theirs in zip(*map(list_counts, question.args), strict=False):
        if bool(ours.terms) != bool(theirs.terms) and ours.value != theirs.value:
            tracker.fix([*ours.axes, *theirs.axes], question, DECIDES)
            return True
    return False


def _stays_divisible(tracker: Tracker, question: fx.Node, answer: bool) -> bool:
    """Tell whether channels that are found divisible, `C % 4 == 0`, may be kept so, and see to it."""
    remainder = question.args[0] if question.args else None
    is_asked = question.target is (operator.eq if answer else operator.ne) and question.args[1:] == (0,)
    if not is_asked or not isinstance(remainder, fx.Node) or remainder.target is not operator.mod:
        return False
    count, divisor = get_count(remainder.args[0]), remainder.args[1]
    if not _is_plain(count) or not isinstance(divisor, int):
        return False
    tracker.divide(count.axes[0], divisor, question, DECIDES)
    return True


def _list_numbers(argument: Any) -> list[tuple[object, Count]]:
    """List a number, or each of a shape, beside what it depends on."""
    if isinstance(argument, tuple | list):
        return [(number, get_count(number)) for number in argument]
    return [(argument, count) for count in list_counts(argument)]


def _keep_equal(
    tracker: Tracker, node: fx.Node, ours: tuple[object, Count], theirs: tuple[object, Count]
) -> bool:
    """Let channels follow the attribute that counts them, or change with those that are as many."""
    if not ours[1].terms and not theirs[1].terms:
        return True
    for (size, _), (_, count) in ((ours, theirs), (theirs, ours)):
        if isinstance(size, SizeAttribute):
            return _is_plain(count) and tracker.follow_size(size, count.axes[0])
    counts = [count for count in (ours[1], theirs[1]) if count.terms]
    if not all(map(_is_plain, counts)):
        return False
    if len(counts) == 1:  # the other is a number: as many they stay
        tracker.fix(counts[0].axes, node, DECIDES)
        return True
    tracker.unite(ours[1].axes[0], theirs[1].axes[0], node)
    return True


def _is_plain(count: Count) -> bool:
    """Tell whether a number counts the channels of one axis."""
    return count.is_linear and not count.constant and [factor for factor, _ in count.terms] == [1]


def _list_counts(sizes: list[object]) -> list[Count]:
    """List what each size depends on, of numbers or of shapes."""
    counts: list[Count] = []
    for size in sizes:
        size_counts = size if isinstance(size, Count) else get_counts(size)
        counts += [size_counts] if isinstance(size_counts, Count) else size_counts
    return counts


def _follow_size(tracker: Tracker, node: fx.Node, size: object, count: Count) -> Axis | None:
    """Give the channels that a size counts, which may be an attribute."""
    if not isinstance(size, SizeAttribute):
        return _follow_count(tracker, node, count)
    axis = tracker.elements.new(size)
    return axis if tracker.follow_size(size, axis) else None


def _follow_count(tracker: Tracker, node: fx.Node, count: Count) -> Axis | None:
    """Give the channels whose number makes a dimension of equal entries."""
    if not count.terms:
        return None
    if _is_plain(count):
        return count.terms[0][1]
    tracker.fix(count.axes, node, "computes with the number of channels")
    return None
