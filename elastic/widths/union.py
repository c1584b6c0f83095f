"""Tell which channel elements are one and the same (a union-find over integers).

Every channel position of every tensor dimension that discovery meets is an *element*. Operations that
force two positions to agree unite their elements; whatever cannot change fixes them, with the reason.
An axis is an integer array of elements, one a position, so concatenation, slicing, flattening and
shuffling are ordinary array operations on it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Axis = npt.NDArray[np.int64]


class Reasons(NamedTuple):
    """Hold the reason noted for each element, by representative: its number, -1 where there is none."""

    numbers: Axis
    texts: list[str]

    def get(self, element: int) -> str | None:
        """Get the reason noted for an element."""
        number = int(self.numbers[element])
        return None if number < 0 else self.texts[number]


class ChannelUnion:
    """Unite channel elements, and remember why some of them are fixed, mixed or tied.

    *Fixed* elements may not be added or removed. *Mixed* ones are normalised over together (group and
    layer norm), so that adding or removing one changes its neighbours' values. *Tied* ones are of an axis
    that was cut into parts that change only together.
    """

    def __init__(self) -> None:
        self._roots: Axis = np.empty(0, np.int64)
        self._size = 0
        self._marks = np.zeros(0, dtype=bool)  # all False, but for a moment
        self._pairs: list[tuple[Axis, Axis]] = []  # to be united
        self._fixed: list[tuple[Axis, str]] = []
        self._mixed: list[tuple[Axis, str]] = []
        self._tied: list[Axis] = []

    @property
    def size(self) -> int:
        """Count the elements."""
        return self._size

    def new(self, size: int) -> Axis:
        """Make an axis of `size` elements that nothing has united yet."""
        start, self._size = self._size, self._size + size
        return np.arange(start, self._size)

    def unite(self, first: Axis, second: Axis) -> None:
        """Make two axes one, position by position; the earliest element represents those that are one.

        Raises:
            ValueError: they are not of one length.
        """
        if len(first) != len(second):
            raise ValueError(f"axes of {len(first)} and {len(second)} channels cannot be one")
        if first is not second:
            self._pairs.append((first, second))

    def tie(self, axis: Axis, parts: int) -> Axis:
        """Cut an axis into equal parts that change only together; return the first part."""
        return self.tie_parts(list(axis.reshape(parts, -1)))

    def tie_parts(self, parts: Sequence[Axis]) -> Axis:
        """Let equal parts of an axis change only together; return the first one."""
        for part in parts[1:]:
            if not np.array_equal(parts[0], part):  # channels that are repeated are tied by nature
                self.unite(parts[0], part)
                self._tied.append(part)
        return parts[0]

    def fix(self, axis: Axis | None, reason: str) -> None:
        """Keep the channels of an axis as they are; the first reason counts."""
        if axis is not None:
            self._fixed.append((axis, reason))

    def fix_all(self, axes: Iterable[Axis | None], reason: str) -> None:
        """Keep the channels of several axes as they are."""
        for axis in axes:
            self.fix(axis, reason)

    def mix(self, axis: Axis | None, reason: str) -> None:
        """Note that the channels of an axis are normalised over together; the first reason counts."""
        if axis is not None:
            self._mixed.append((axis, reason))

    def includes(self, axes: Sequence[Axis], parts: Sequence[Axis]) -> bool:
        """Tell whether all elements of some axes are, as they stand, among those of others."""
        if len(self._marks) < self._size:
            self._marks = np.zeros(2 * self._size, dtype=bool)
        for axis in axes:
            self._marks[axis] = True
        is_included = all(self._marks[part].all() for part in parts)
        for axis in axes:
            self._marks[axis] = False
        return is_included

    def represent(self, axis: Axis) -> Axis:
        """Replace every element of an axis by the one that represents it."""
        return self._find_roots()[axis]

    @property
    def fixed(self) -> Reasons:
        """Say why elements are fixed."""
        return self._list_reasons(self._fixed)

    @property
    def mixed(self) -> Reasons:
        """Say which norm mixes elements."""
        return self._list_reasons(self._mixed)

    @property
    def tied(self) -> Axis:
        """List the elements that cuts tie to others, by representative."""
        return np.unique(self.represent(np.concatenate([np.empty(0, np.int64), *self._tied])))

    def _list_reasons(self, notes: Sequence[tuple[Axis, str]]) -> Reasons:
        roots = self._find_roots()
        numbers = np.full(len(roots), -1, dtype=np.int64)
        for number in reversed(range(len(notes))):
            numbers[roots[notes[number][0]]] = number
        return Reasons(numbers, [reason for _, reason in notes])

    def _find_roots(self) -> Axis:
        """Find the representative of every element: the lowest of those that are one.

        All pairs are united at once: the higher root of each is hung onto the lower one, and paths are made
        short, until both ends of every pair have one root.
        """
        start = len(self._roots)
        if start < self._size:
            self._roots = np.concatenate([self._roots, np.arange(start, self._size)])
        roots = self._roots
        if not self._pairs:
            return roots
        first, second = (np.concatenate(ends) for ends in zip(*self._pairs, strict=True))
        self._pairs = []
        while True:
            first, second = roots[first], roots[second]
            differs = first != second
            if not differs.any():
                return roots
            first, second = first[differs], second[differs]
            np.minimum.at(roots, np.maximum(first, second), np.minimum(first, second))
            while not np.array_equal(shorter := roots[roots], roots):
                roots[:] = shorter
