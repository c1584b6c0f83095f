"""Gather channel elements into widths.

Elements that lie on the same tensor dimensions, equally often, come and go together: they are one width.
Where a dimension holds the channels of several widths, or each several times, its *layout* says how they lie;
an order that a layout cannot say fixes the widths concerned.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from elastic.widths.tracker import Dimension, Records
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
    axes = {place: elements.represent(axis) for place, (_, axis) in records.items()}
    groups = _group(elements, records, axes)
    layouts = _read_layouts(axes, groups)
    mixed = elements.mixed
    widths = {}
    for name, members in groups.free().items():
        slots = tuple(
            Slot(*place, records[place][0], layout)
            for place, layout in layouts.items()
            if any(segment.width == name for segment in layout)
        )
        norm = next((mixed[element] for element in members.tolist() if element in mixed), None)
        widths[name] = Width(name, len(members), slots, norm)
    return Widths(widths, groups.reasons)


def _group(elements: ChannelUnion, records: Records, axes: Mapping[Dimension, Axis]) -> Groups:
    """Put elements together that lie on the same places equally often, and are fixed or free alike.

    The elements of each layer's output, in their order, make up its groups: the first is called after the
    layer, further ones (where only a part of its channels goes somewhere) are numbered.
    """
    occurrences: dict[int, list[tuple[Dimension, int]]] = defaultdict(list)
    for place, axis in axes.items():
        for element, times in Counter(axis.tolist()).items():
            occurrences[element].append((place, times))
    fixed, tied = elements.fixed, elements.tied
    groups, grouped = Groups(), set[int]()
    for place in (place for place, (role, _) in records.items() if role == "out"):
        writer = place[0] or place[1]  # a weight of the model's own goes by its name
        alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for element in dict.fromkeys(axes[place].tolist()):
            if element not in grouped:
                alike[tuple(occurrences[element]), element in fixed].append(element)
        for number, members in enumerate(alike.values()):
            name = f"{writer}:{number}" if number else writer
            groups.members[name] = np.array(members)
            grouped.update(members)
            if members[0] in fixed:
                groups.reasons[name] = fixed[members[0]]
            elif len(members) == 1 and members[0] in tied:
                groups.reasons[name] = "splits and shuffles tie all of its channels together"
    return groups


def _read_layouts(axes: Mapping[Dimension, Axis], groups: Groups) -> dict[Dimension, Layout]:
    """Read the layout of every place; what no layout can say fixes the groups concerned.

    A group that is fixed no longer needs an order, which can only make the others' layouts simpler: so read
    again until all can be read.
    """
    while True:
        free = groups.free()
        owners = {e: (name, i) for name, members in free.items() for i, e in enumerate(members.tolist())}
        layouts = {place: _read_layout(axis.tolist(), free, owners) for place, axis in axes.items()}
        unread = [place for place, layout in layouts.items() if layout is None]
        if not unread:
            return {place: layout for place, layout in layouts.items() if layout is not None}
        for place in unread:
            for name in {owners[element][0] for element in axes[place].tolist() if element in owners}:
                groups.reasons[name] = f"its channels are interleaved with others' in {place[0]}.{place[1]}"


def _read_layout(
    axis: list[int], free: Mapping[str, Axis], owners: Mapping[int, tuple[str, int]]
) -> Layout | None:
    """Read an axis as segments: whole groups in order, each channel repeated, and runs of what never changes.

    None where a group's channels lie in another order, or not all of them together.
    """
    segments: list[Segment] = []
    start = 0
    while start < len(axis):
        if axis[start] not in owners:
            end = next((i for i in range(start, len(axis)) if axis[i] in owners), len(axis))
            segments.append(Segment(None, end - start))
        else:
            name, _ = owners[axis[start]]
            members = free[name]
            repeat = next((i for i in range(start, len(axis)) if axis[i] != axis[start]), len(axis)) - start
            end = start + repeat * len(members)
            if axis[start:end] != np.repeat(members, repeat).tolist():
                return None
            segments.append(Segment(name, repeat))
        start = end
    return tuple(segments)
