"""Tell which channel elements are one and the same (a union-find over integers).

Every channel position of every tensor dimension that discovery meets is an *element*. Operations that
force two positions to agree unite their elements; whatever cannot change fixes them, with the reason.
An axis is an integer array of elements, one a position, so concatenation, slicing, flattening and
shuffling are ordinary array operations on it.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

Axis = npt.NDArray[np.int64]


class ChannelUnion:
    """Unite channel elements, and remember why some of them are fixed, mixed or tied.

    *Fixed* elements may not be added or removed. *Mixed* ones are normalised over together (group and
    layer norm), so that adding or removing one changes its neighbours' values. *Tied* ones are of an axis
    that was cut into parts that change only together.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._fixed: dict[int, str] = {}
        self._mixed: dict[int, str] = {}
        self._tied: set[int] = set()

    def new(self, size: int) -> Axis:
        """Make an axis of `size` elements that nothing has united yet."""
        start = len(self._parent)
        self._parent.extend(range(start, start + size))
        return np.arange(start, start + size)

    def unite(self, first: Axis, second: Axis) -> None:
        """Make two axes one, position by position; the earlier element represents the pair."""
        for pair in set(zip(first.tolist(), second.tolist(), strict=True)):
            root, other = sorted(map(self._find, pair))
            self._parent[other] = root

    def tie(self, axis: Axis, parts: int) -> Axis:
        """Cut an axis into equal parts that change only together; return the first part."""
        first, *rest = axis.reshape(parts, -1)
        for part in rest:
            self.unite(first, part)
            self._tied.update(part.tolist())
        return first

    def fix(self, axis: Axis | None, reason: str) -> None:
        """Keep the channels of an axis as they are; the first reason counts."""
        _note(self._fixed, axis, reason)

    def fix_all(self, axes: Iterable[Axis | None], reason: str) -> None:
        """Keep the channels of several axes as they are."""
        for axis in axes:
            self.fix(axis, reason)

    def mix(self, axis: Axis | None, reason: str) -> None:
        """Note that the channels of an axis are normalised over together; the first reason counts."""
        _note(self._mixed, axis, reason)

    def represent(self, axis: Axis) -> Axis:
        """Replace every element of an axis by the one that represents it."""
        return np.array([self._find(element) for element in axis.tolist()], dtype=np.int64)

    @property
    def fixed(self) -> dict[int, str]:
        """Say why elements are fixed, by representative."""
        return self._represent_keys(self._fixed)

    @property
    def mixed(self) -> dict[int, str]:
        """Say which norm mixes elements, by representative."""
        return self._represent_keys(self._mixed)

    @property
    def tied(self) -> set[int]:
        """List the elements that cuts tie to others, by representative."""
        return set(map(self._find, self._tied))

    def _represent_keys(self, reasons: Mapping[int, str]) -> dict[int, str]:
        represented: dict[int, str] = {}
        for element, reason in reasons.items():
            represented.setdefault(self._find(element), reason)
        return represented

    def _find(self, element: int) -> int:
        while self._parent[element] != element:
            self._parent[element] = self._parent[self._parent[element]]  # halve the path for the next time
            element = self._parent[element]
        return element


def _note(reasons: dict[int, str], axis: Axis | None, reason: str) -> None:
    for element in () if axis is None else np.unique(axis).tolist():
        reasons.setdefault(element, reason)
