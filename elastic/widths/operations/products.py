"""Follow channels through products of tensors: matmul, einsum, attention.

What is summed over agrees in both factors. It is mixed: a fresh channel is felt, since no weight reads it.
"""

from collections.abc import Sequence
from typing import Any

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
)
from elastic.widths.union import Axis

SUMS = "sums over its channels"


def multiply_matrices(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow matmul, mm and bmm: the last dimension of one factor meets the last but one of the other."""
    return _multiply(tracker, node, get_input(node), get_argument(node, 1, "other", "mat2", "tensor2"))


def add_product(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow addmm and baddbmm: what a product of two matrices is added to agrees with it."""
    factors = get_argument(node, 1, "mat1", "batch1"), get_argument(node, 2, "mat2", "batch2")
    if not isinstance(factors[0], fx.Node):
        raise NotFollowed("multiplies what is no tensor")
    axes, summand = _multiply(tracker, node, *factors), get_input(node)
    ends = zip(reversed(axes), reversed(get_axes(summand)), reversed(get_shape(summand)), strict=False)
    for d, (axis, other, size) in enumerate(ends, 1):
        if size < get_shape(node)[-d]:
            tracker.fix([other], node, "broadcasts one channel over many")
        elif axis is not None or other is not None:
            tracker.unite(axis, other, node)
    return axes


def _multiply(tracker: Tracker, node: fx.Node, first: fx.Node, second: object) -> Axes:
    if not isinstance(second, fx.Node) or min(len(get_shape(first)), len(get_shape(second))) < 2:
        raise NotFollowed("multiplies by a vector")
    batch = len(get_shape(node)) - 2
    letters = [f"b{d}" for d in range(batch)]
    terms = [
        [*letters[batch + 2 - len(get_shape(factor)) :], *ends]
        for factor, ends in ((first, ("row", "sum")), (second, ("sum", "column")))
    ]
    return _contract(tracker, node, [first, second], terms, [*letters, "row", "column"])


def contract(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow an einsum that is given as a text and tensors; of a list torch makes such a call."""
    equation, *factors = node.args
    if not isinstance(equation, str) or "->" not in equation:
        raise NotFollowed("is no einsum with an arrow")
    reads, _, writes = equation.replace(" ", "").partition("->")
    terms = reads.split(",")
    ndims = [len(get_value(factor).shape) for factor in factors]
    counts = [n - len(term.replace("...", "")) for n, term in zip(ndims, terms, strict=True)]
    ellipsis = [f"…{i}" for i in reversed(range(max(counts)))]  # aligned at its end
    spelling = [_spell(term, ellipsis[len(ellipsis) - n :]) for term, n in zip(terms, counts, strict=True)]
    return _contract(tracker, node, factors, spelling, _spell(writes, ellipsis))


def _spell(term: str, ellipsis: Sequence[str]) -> list[str]:
    """List the letters of a term, with others for its ellipsis."""
    before, dots, after = term.partition("...")
    return [*before, *(ellipsis if dots else ()), *after]


def measure_distances(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow cdist: the distance of each row of one matrix to each row of the other."""
    factors = [get_input(node), get_argument(node, 1, "x2")]
    letters = [f"b{d}" for d in range(len(get_shape(node)) - 2)]
    terms = [
        [*letters[len(letters) + 2 - len(get_shape(factor)) :], row, "sum"]
        for factor, row in zip(factors, ("row", "column"), strict=True)
    ]
    return _contract(tracker, node, factors, terms, [*letters, "row", "column"])


def attend(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow scaled dot-product attention: queries agree with keys, and what is attended to with values."""
    q, k, v = (get_argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    letters = [f"b{d}" for d in range(len(get_shape(q)) - 2)]
    terms = [[*letters, "row", "sum"], [*letters, "column", "sum"], [*letters, "column", "value"]]
    mask = get_argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        tracker.fix(get_axes(mask), node, "is given a mask")
    return _contract(tracker, node, [q, k, v], terms, [*letters, "row", "value"])


def _contract(
    tracker: Tracker,
    node: fx.Node,
    factors: Sequence[Any],
    terms: Sequence[Sequence[str]],
    result: Sequence[str],
) -> Axes:
    """Let dimensions of one letter agree; those that the result lacks are summed over, and mixed."""
    axes: dict[str, list[tuple[Axis | None, int]]] = {}
    for factor, letters in zip(factors, terms, strict=True):
        for letter, axis, size in zip(letters, get_axes(factor), get_shape(factor), strict=True):
            axes.setdefault(letter, []).append((axis, size))
    axis_by_letter: dict[str, Axis | None] = {}
    for letter, ends in axes.items():
        largest = max(size for _, size in ends)
        tracker.fix([a for a, size in ends if size < largest], node, "broadcasts one channel over many")
        first, *others = [axis for axis, size in ends if size == largest]
        for axis in others:
            tracker.unite(first, axis, node)
        axis_by_letter[letter] = first
        if letter not in result:
            tracker.mix([first], node, SUMS)
    return tuple(axis_by_letter[letter] for letter in result)
