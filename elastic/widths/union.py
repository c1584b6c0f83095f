"""Channel elements and which of them are one and the same (a union-find over integers).

Every channel position of every tensor dimension that discovery meets is an *element*. Operations that
force two positions to agree unite their elements; whatever cannot change fixes them, with the reason.
An axis is an integer array of elements, one a position, so concatenation, slicing, flattening and
shuffling are ordinary array operations on it.
"""

import numpy as np
import numpy.typing as npt

Axis = npt.NDArray[np.int64]


class ChannelUnion:
    """A union-find over channel elements that remembers why some of them are fixed or mixed.

    *Fixed* elements may not be added or removed. *Mixed* ones are normalised over together (group and
    layer norm), so that adding or removing one changes its neighbours' values.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self.fixed: dict[int, str] = {}
        self.mixed: dict[int, str] = {}
        self.tied: set[int] = set()

    def new(self, size: int) -> Axis:
        """An axis of `size` elements that nothing has united yet."""
        start = len(self._parent)
        self._parent.extend(range(start, start + size))
        return np.arange(start, start + size)

    def unite(self, a: Axis, b: Axis) -> None:
        """Make the two axes one, position by position; the earlier element represents the pair."""
        for x, y in {(int(x), int(y)) for x, y in zip(a, b, strict=True)}:
            first, second = sorted((self._find(x), self._find(y)))
            self._parent[second] = first

    def tie(self, axis: Axis, parts: int) -> Axis:
        """Cut the axis into equal parts that change only together; returns the first part."""
        first, *rest = axis.reshape(parts, -1)
        for part in rest:
            self.unite(first, part)
            self.tied.update(part.tolist())
        return first

    def fix(self, axis: Axis | None, why: str) -> None:
        for x in () if axis is None else np.unique(axis):
            self.fixed.setdefault(int(x), why)

    def mix(self, axis: Axis | None, why: str) -> None:
        for x in () if axis is None else np.unique(axis):
            self.mixed.setdefault(int(x), why)

    def roots(self, axis: Axis) -> Axis:
        """The axis with every element replaced by its representative."""
        return np.array([self._find(int(x)) for x in axis], dtype=np.int64)

    def reasons(self, reasons: dict[int, str]) -> dict[int, str]:
        """`fixed` or `mixed`, by representative."""
        found: dict[int, str] = {}
        for x, why in reasons.items():
            found.setdefault(self._find(x), why)
        return found

    def _find(self, x: int) -> int:
        while self._parent[x] != x:
            self._parent[x] = self._parent[self._parent[x]]
            x = self._parent[x]
        return x
