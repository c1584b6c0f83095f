"""Gather channel elements into widths.

Elements that lie on the same tensor dimensions, equally often, come and go together: they are one width.
Where a dimension holds the channels of several widths, or each several times, its *layout* says how they lie;
an order that a layout cannot say fixes the widths concerned.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic.widths.stock import Dimension, Records
from elastic.widths.union import Axis, ChannelUnion
from elastic.widths.width import Segment, Slot, Width, Widths

Layout = tuple[Segment, ...]


@dataclass
class Groups:
    """Hold groups of elements, each a candidate for a width, and why some of them cannot change."""

    members: dict[str, Axis] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def free(self) -> dict[str, Axis]:
        """Select the groups that nothing is known against."""
        return {name: members for name, members in self.members.items() if name not in self.reasons}


def collect_widths(elements: ChannelUnion, records: Records) -> Widths:
    """Gather the elements that lie on the recorded places into widths."""
    axes = _represent(elements, records)
    groups = _group(elements, records, axes)
    layouts = _read_layouts(records, axes, groups, elements.size)
    slots: dict[str, list[Slot]] = {name: [] for name in groups.free()}
    for place, layout in layouts.items():
        slot = Slot(*place, records[place][0], layout)
        for name in dict.fromkeys(segment.width for segment in layout if segment.width is not None):
            slots[name].append(slot)
    mixed = elements.mixed
    widths = {}
    for name, members in groups.free().items():
        numbers = mixed.numbers[members]
        mixed_members = members[numbers >= 0]
        norm = mixed.get(mixed_members[0]) if len(mixed_members) else None
        widths[name] = Width(name, len(members), tuple(slots[name]), norm)
    return Widths(widths, groups.reasons)


def _represent(elements: ChannelUnion, records: Records) -> dict[Dimension, Axis]:
    """Replace the elements of all places by those that represent them; equal axes are one object."""
    by_axis: dict[int, Axis] = {}
    by_content: dict[bytes, Axis] = {}
    for _, axis in records.values():
        if id(axis) not in by_axis:
            roots = elements.represent(axis)
            by_axis[id(axis)] = by_content.setdefault(roots.tobytes(), roots)
    return {place: by_axis[id(axis)] for place, (_, axis) in records.items()}


def _group(elements: ChannelUnion, records: Records, axes: Mapping[Dimension, Axis]) -> Groups:
    """Put elements together that lie on the same places equally often, and are fixed or free alike.

    The elements of each layer's output, in their order, make up its groups: the first is called after the
    layer, further ones (where only a part of its channels goes somewhere) are numbered.
    """
    fixed, tied = elements.fixed, elements.tied
    marks = _mark_occurrences(list({id(axis): axis for axis in axes.values()}.values()), elements.size)
    marks += np.uint64(1) * (fixed.numbers >= 0)
    groups, is_grouped = Groups(), np.zeros(elements.size, dtype=bool)
    for place in (place for place, (role, _) in records.items() if role == "out"):
        writer = place[0] or place[1]  # a weight of the model's own goes by its name
        members = _list_distinct(axes[place])
        members = members[~is_grouped[members]]
        is_grouped[members] = True
        for number, alike in enumerate(_list_distinct(marks[members])):
            name = f"{writer}:{number}" if number else writer
            group = groups.members[name] = members[marks[members] == alike]
            if (reason := fixed.get(group[0])) is not None:
                groups.reasons[name] = reason
            elif len(group) == 1 and group[0] in tied:
                groups.reasons[name] = "splits and shuffles tie all of its channels together"
    return groups


def _mark_occurrences(axes: Sequence[Axis], size: int) -> NDArray[np.uint64]:
    """Give each element a number that says on which of different axes it lies, and how often on each.

    It is a sum of random numbers of 63 bits, one for each axis and count; the last bit is left free.
    """
    marks = np.zeros(size, dtype=np.uint64)
    random = np.random.Generator(np.random.PCG64(0))
    marks_by_count: dict[int, NDArray[np.uint64]] = {}
    for i, axis in enumerate(axes):
        for n, members in _split_by_count(axis):
            if n not in marks_by_count:
                marks_by_count[n] = random.integers(0, 2**63, len(axes), dtype=np.uint64) << np.uint64(1)
            marks[members] += marks_by_count[n][i]
    return marks


def _split_by_count(axis: Axis) -> Iterator[tuple[int, Axis]]:
    """Split the elements of an axis by how often they lie on it."""
    if _ascends(axis):
        yield 1, axis
        return
    members, times = np.unique(axis, return_counts=True)
    for n in np.unique(times).tolist():
        yield n, members[times == n]


def _list_distinct(values: NDArray[Any]) -> NDArray[Any]:
    """List each value once, in the order of their first places."""
    if _ascends(values):
        return values
    if (values == values[0]).all():
        return values[:1]
    _, places = np.unique(values, return_index=True)
    return values[np.sort(places)]


def _ascends(values: NDArray[Any]) -> bool:
    """Tell whether each value is larger than the one before, as nearly always: then none comes twice."""
    return bool((values[1:] > values[:-1]).all())


def _read_layouts(
    records: Records, axes: Mapping[Dimension, Axis], groups: Groups, size: int
) -> dict[Dimension, Layout]:
    """Read the layout of every place; what no layout can say fixes the groups concerned.

    A group that is fixed no longer needs an order, which can only make the others' layouts simpler: so read
    again until all can be read.
    """
    while True:
        free, owners = groups.free(), np.full(size, -1, dtype=np.int64)
        for number, members in enumerate(free.values()):
            owners[members] = number
        layouts = _read_all(records, axes, owners, free)
        unread = [place for place, layout in layouts.items() if layout is None]
        if not unread:
            return {place: layout for place, layout in layouts.items() if layout is not None}
        names = list(free)
        for place in unread:
            for number in np.unique(owners[axes[place]]).tolist():
                if number >= 0:
                    reason = f"its channels are interleaved with others' in {place[0]}.{place[1]}"
                    groups.reasons[names[number]] = reason


def _read_all(
    records: Records, axes: Mapping[Dimension, Axis], owners: Axis, free: Mapping[str, Axis]
) -> dict[Dimension, Layout | None]:
    """Read the layout of every place, None of those that no layout can say.

    Args:
        owners: the number of each element's group, -1 for what never changes.
        free: the groups' elements.
    """
    names, members = list(free), list(free.values())
    layouts: dict[Dimension, Layout | None] = {}
    by_axis: dict[int, Layout | None] = {}
    for place, axis in axes.items():
        if records[place][0] == "count":  # an attribute, for which order is nothing
            layouts[place] = _read_counts(owners[axis], names, members)
            continue
        if id(axis) not in by_axis:
            by_axis[id(axis)] = _read_layout(axis, owners[axis], names, members)
        layouts[place] = by_axis[id(axis)]
    return layouts


def _read_counts(numbers: Axis, names: Sequence[str], members: Sequence[Axis]) -> Layout:
    """Read an axis of which only the number of channels matters."""
    segments = []
    for number, times in zip(
        *(part.tolist() for part in np.unique(numbers, return_counts=True)), strict=True
    ):
        is_free = number >= 0
        repeat = times // len(members[number]) if is_free else times
        segments.append(Segment(names[number] if is_free else None, repeat))
    return tuple(segments)


def _read_layout(axis: Axis, numbers: Axis, names: Sequence[str], members: Sequence[Axis]) -> Layout | None:
    """Read an axis as segments: whole groups in order, each channel repeated, and runs of what never changes.

    None where a group's channels lie in another order, or not all of them together.

    Args:
        numbers: of the group of each position, -1 for what never changes.
    """
    segments: list[Segment] = []
    start, stop = 0, len(axis)
    while start < stop:
        number = numbers[start]
        if number < 0:
            end = start + _measure_run(numbers[start:])
            segments.append(Segment(None, end - start))
        else:
            group = members[number]
            repeat = _measure_run(axis[start : start + stop // len(group)])
            end = start + repeat * len(group)
            if not np.array_equal(axis[start:end], np.repeat(group, repeat) if repeat > 1 else group):
                return None
            segments.append(Segment(names[number], repeat))
        start = end
    return tuple(segments)


def _measure_run(values: Axis) -> int:
    """Count how often the first value comes at once."""
    others = np.flatnonzero(values != values[0])
    return int(others[0]) if len(others) else len(values)
