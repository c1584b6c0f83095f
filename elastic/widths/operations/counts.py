"""Follow numbers that a model computes from sizes: `x.shape[1] // 2` counts half of the channels of x.

A view, a split or a slice that is given such a number is followed where the number and the channels that it
stands for change alike. Whatever else computes with it keeps those channels as they are.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce, singledispatch
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from elastic.widths.operations.interface import (
    get_argument,
    get_input,
    get_operation_name,
    list_axes,
    resolve_sizes,
)
from elastic.widths.tracing.sizes import SizeAttribute
from elastic.widths.union import Axis, ChannelUnion


@dataclass(frozen=True, eq=False)
class Count:
    """Hold a number as a constant and, for some axes, a factor of their channels.

    A number that is computed from channels in another way is not linear: it stands for no axis.
    """

    constant: Fraction
    terms: tuple[tuple[Fraction, Axis], ...] = ()
    is_linear: bool = True

    @property
    def axes(self) -> list[Axis]:
        """List the axes that the number depends on."""
        return [axis for _, axis in self.terms]

    @property
    def value(self) -> Fraction:
        """Compute the number from the sizes as they are."""
        return self.constant + sum((factor * len(axis) for factor, axis in self.terms), Fraction())

    def counts(self, axis: Axis | None, elements: ChannelUnion) -> bool:
        """Tell whether the number is that of an axis' channels, whichever are added or removed."""
        if not self.is_linear or self.constant != 0:
            return False
        if axis is not None and len(self.terms) == 1 and self.terms[0][0] == 1 and self.terms[0][1] is axis:
            return True
        difference: dict[int, Fraction] = {}
        for factor, part in (*self.terms, *(((Fraction(-1), axis),) if axis is not None else ())):
            roots, times = np.unique(elements.represent(part), return_counts=True)
            for root, n in zip(roots.tolist(), times.tolist(), strict=True):
                difference[root] = difference.get(root, Fraction()) + factor * n
        return not any(difference.values())

    def __add__(self, other: "Count") -> "Count":
        is_linear = self.is_linear and other.is_linear
        return Count(self.constant + other.constant, self.terms + other.terms, is_linear)

    def scale(self, factor: Fraction) -> "Count":
        """Multiply the number by a constant."""
        return Count(
            self.constant * factor, tuple((f * factor, axis) for f, axis in self.terms), self.is_linear
        )


Counts = Count | tuple["Count", ...]  # of a number, of a shape


def count_axis(axis: Axis | None, size: int) -> Count:
    """Count the entries of a dimension."""
    return Count(Fraction(size)) if axis is None else Count(Fraction(), ((Fraction(1), axis),))


@singledispatch
def get_counts(argument: object) -> Counts:
    """Get what a number, or each of several, depends on: of a node, or of an argument itself."""
    return Count(Fraction(), is_linear=False)


@get_counts.register
def _(argument: int) -> Counts:
    return Count(Fraction(argument))


@get_counts.register
def _(argument: float) -> Counts:
    return Count(Fraction(argument)) if isfinite(argument) else Count(Fraction(), is_linear=False)


@get_counts.register(tuple)
@get_counts.register(list)
def _(argument: Sequence[object]) -> Counts:
    return tuple(map(get_count, argument))


@get_counts.register
def _(argument: fx.Node) -> Counts:
    counts: Counts | None = argument.meta.get("counts")
    return get_counts(argument.meta["value"]) if counts is None else counts


def get_count(argument: Any) -> Count:
    """Get what one number depends on."""
    counts = get_counts(argument)
    return counts if isinstance(counts, Count) else _entangle(counts)


def list_counts(argument: Any) -> list[Count]:
    """List what each number of a shape, or the one number, depends on."""
    counts = get_counts(argument)
    return [counts] if isinstance(counts, Count) else list(counts)


def count_node(node: fx.Node, value: Any) -> Counts:
    """Find what a node's number, or each of a shape's, depends on."""
    is_call = node.op in ("call_function", "call_method")
    name = get_operation_name(node).strip("_") if is_call else ""  # an input or a layer may be called `size`
    counts = COUNTING.get(name, _count_anyhow)(node)
    if not any(count.terms for count in ([counts] if isinstance(counts, Count) else counts)):
        return get_counts(value)
    if isinstance(counts, Count) and counts.is_linear and counts.value != value:  # rounded, say
        return _entangle([counts])
    return counts


def find_multiple(node: fx.Node) -> SizeAttribute | None:
    """Find the multiple of an attribute that a node computes with what no channel changes."""
    if node.target not in (operator.mul, operator.floordiv):
        return None
    size, other = map(resolve_sizes, node.args)
    if node.target is operator.mul and not isinstance(size, SizeAttribute):
        size, other = other, size
    count = get_count(other)
    is_whole = count.is_linear and not count.terms and count.constant.denominator == 1
    if not isinstance(size, SizeAttribute) or not is_whole:
        return None
    multiple = node.target(size, other if isinstance(other, SizeAttribute) else int(count.constant))
    return multiple if isinstance(multiple, SizeAttribute) else None


def _count_shape(node: fx.Node) -> Counts:
    """Count `x.shape` and `x.size()`; another attribute of x may count its channels in a way of its own."""
    source, name = get_input(node), get_argument(node, 1)
    if isinstance(name, str) and (name != "shape" or not isinstance(source.meta["value"], Tensor)):
        return _count_nothing(node) if name in UNCHANGED else _count_anyhow(node)
    counts = _list_dimensions(source)
    dim = node.kwargs.get("dim", name)
    return counts[dim] if isinstance(dim, int) else counts


def _count_length(node: fx.Node) -> Counts:
    """Count `len(x)`, the first dimension of a tensor; `len(x.shape)` is changed by no channel."""
    dimensions = _list_dimensions(get_input(node))
    return dimensions[0] if dimensions else _count_nothing(node)


def _count_entries(node: fx.Node) -> Counts:
    """Count `x.numel()`, or that of a shape."""
    source = get_input(node)
    return _multiply_all(list_counts(source) if "counts" in source.meta else _list_dimensions(source))


def _count_numbers(node: fx.Node) -> Counts:
    """Count `math.prod(x.shape[1:])`."""
    return _multiply_all([*list_counts(node.args[0]), *map(get_count, node.args[1:])])


def _count_nothing(node: fx.Node) -> Counts:
    """Count `x.dim()` and its like, which no channel changes."""
    return get_counts(node.meta["value"])


def _list_dimensions(source: Any) -> tuple[Count, ...]:
    value, axes = source.meta["value"], source.meta["axes"]
    if not isinstance(value, Tensor):
        return ()
    return tuple(count_axis(axis, size) for axis, size in zip(axes, value.shape, strict=True))


def _count_item(node: fx.Node) -> Counts:
    counts, index = get_counts(node.args[0]), node.args[1]
    if isinstance(counts, Count) or not isinstance(index, int | slice):
        return _count_anyhow(node)
    return counts[index]


def _count_sum(node: fx.Node) -> Counts:
    first, second = map(get_counts, node.args)
    if isinstance(first, Count) and isinstance(second, Count):
        return first + second
    return (*list_counts(node.args[0]), *list_counts(node.args[1]))  # shapes are joined


def _count_difference(node: fx.Node) -> Counts:
    return get_count(node.args[0]) + get_count(node.args[1]).scale(Fraction(-1))


def _count_product(node: fx.Node) -> Counts:
    return _multiply(*map(get_count, node.args))


def _count_ratio(node: fx.Node) -> Counts:
    first, second = map(get_count, node.args)
    is_constant = second.is_linear and not second.terms and second.constant != 0
    return first.scale(1 / second.constant) if is_constant else _entangle([first, second])


def _multiply(first: Count, second: Count) -> Count:
    if second.terms:
        first, second = second, first
    is_constant = second.is_linear and not second.terms
    return first.scale(second.constant) if is_constant else _entangle([first, second])


def _multiply_all(counts: Iterable[Count]) -> Count:
    return reduce(_multiply, counts, Count(Fraction(1)))


def _count_same(node: fx.Node) -> Counts:
    return get_counts(node.args[0])


def _count_anyhow(node: fx.Node) -> Count:
    """Depend on all numbers that a node reads, and on the channels of all tensors: `x.stride(0)`."""
    is_number = not isinstance(node.meta["value"], bool | torch.dtype | torch.device)
    return _entangle(
        [count for source in node.all_input_nodes for count in _list_all_counts(source, is_number)]
    )


def _list_all_counts(source: fx.Node, of_tensors: bool) -> list[Count]:
    if "counts" in source.meta:
        return list_counts(source)
    return [count_axis(axis, len(axis)) for axis in list_axes(source.meta["axes"])] if of_tensors else []


def _entangle(counts: Sequence[Count]) -> Count:
    """Depend on all that several numbers depend on, in no way that could be followed."""
    return Count(Fraction(), reduce(operator.add, (count.terms for count in counts), ()), is_linear=False)


# Numbers that a tensor gives and no channel changes.
UNCHANGED = ("dim", "ndim", "ndimension", "element_size", "itemsize", "get_device")
COUNTING: dict[str, Callable[[fx.Node], Counts]] = {
    "getattr": _count_shape,
    "size": _count_shape,
    "getitem": _count_item,
    "add": _count_sum,
    "sub": _count_difference,
    "mul": _count_product,
    "iadd": _count_sum,
    "isub": _count_difference,
    "imul": _count_product,
    "ifloordiv": _count_ratio,
    "len": _count_length,
    "numel": _count_entries,
    "prod": _count_numbers,
    "nelement": _count_entries,
    "floordiv": _count_ratio,
    "truediv": _count_ratio,
    "int": _count_same,
    "tuple": _count_same,
    "list": _count_same,
    **dict.fromkeys(UNCHANGED, _count_nothing),
}
