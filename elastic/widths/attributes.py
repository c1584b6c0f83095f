"""Know which attributes of modules a forward uses as they are: channels that they count keep their number."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from elastic.widths.operations.interface import ATTRIBUTE, resolve_sizes
from elastic.widths.stock import Dimension, Records, list_own_axes
from elastic.widths.tracing import describe_node
from elastic.widths.tracing.sizes import AttributePlace, SizeAttribute
from elastic.widths.union import Axis, ChannelUnion


class UsedAttributes:
    """Fix what follows an attribute, and what it counts in its own layer, where it is used as it is.

    Args:
        records: of all places, to which tracking adds.
        computed: the attributes that the forward computes with.
    """

    def __init__(self, elements: ChannelUnion, records: Records, computed: Iterable[AttributePlace]) -> None:
        self.elements, self.records = elements, records
        self._reasons = {get_key(place): f"the forward computes with {place}" for place in computed}
        self._followed: list[SizeAttribute] = []  # by the node at hand

    def find_view(self, size: SizeAttribute, axis: Axis) -> SizeAttribute | None:
        """Find the attribute of which a number is a multiple, if it counts the channels of an axis.

        Of a product's factors that is one that is recorded, if any; the others are used as they are.
        """
        if len(axis) != size:
            return None
        views = [view for view in (size, *size.others) if len(axis) % view.factor.numerator == 0]
        recorded = (view for view in views if get_key(view.place) in self.records)
        view = next(recorded, views[0] if views else None)
        if view is not None:
            for other in (other for other in (size, *size.others) if other is not view):
                self._keep(other, f"{other.place.name} is multiplied by what follows channels")
        return view

    def note_followed(self, size: SizeAttribute, view: SizeAttribute, axis: Axis) -> None:
        """Note that the node at hand lets a number, by one view of it, follow the channels of an axis."""
        self._followed.append(size)
        if (reason := self._reasons.get(get_key(view.place))) is not None:
            self.elements.fix(axis, reason)

    def keep_others(self, node: fx.Node) -> None:
        """Keep the attributes as they are that a node is given and has not let follow."""
        values = map(resolve_sizes, (*node.args, *node.kwargs.values()))
        arguments = (value for value in values if type(value) is not fx.Node)
        for size in (size for value in arguments for size in _list_sizes(value)):
            if not any(size is other for other in self._followed):
                for view in (size, *size.others):
                    self._keep(view, f"{describe_node(node)} takes {view.place.name} as it is")
        self._followed = []

    def _keep(self, size: SizeAttribute, reason: str) -> None:
        key = get_key(size.place)
        self._reasons.setdefault(key, reason)
        if key in self.records:
            self.elements.fix(self.records[key][1], self._reasons[key])

    def fix_own_channels(self, find_module: Callable[[str], nn.Module]) -> None:
        """Fix what these attributes count in their own layers."""
        for (path, name, number), reason in self._reasons.items():
            place = AttributePlace(path, name.removeprefix(ATTRIBUTE), number)
            self.elements.fix_all(list_own_axes(find_module(path), place, self.records), reason)


def get_key(place: AttributePlace) -> Dimension:
    """Return the key of an attribute among records."""
    return place.module, ATTRIBUTE + place.name, place.number


def _list_sizes(value: Any) -> list[SizeAttribute]:
    """List the numbers within arguments that are attributes of modules."""
    if isinstance(value, SizeAttribute):
        return [value]
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, dict):
        value = tuple(value.values())
    return [size for part in value for size in _list_sizes(part)] if isinstance(value, tuple | list) else []
