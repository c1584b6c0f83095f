"""Let attributes of stock layers that a forward uses count what the layers' own tensors hold.

`x[:, : self.conv.out_channels]` may cut channels that are not the convolution's: they change together then.
"""

from collections.abc import Callable
from fractions import Fraction
from math import gcd

import numpy as np
from torch import nn

from elastic.widths.operations.counts import Count
from elastic.widths.operations.interface import ATTRIBUTE, Role
from elastic.widths.tracing.sizes import STOCK, AttributePlace, is_stock
from elastic.widths.union import Axis, ChannelUnion

Dimension = tuple[str, str, int]  # module, tensor, dimension
Records = dict[Dimension, tuple[Role, Axis]]


def list_own_axes(layer: nn.Module, place: AttributePlace, records: Records) -> list[Axis]:
    """List the axes of a stock layer's own tensors that one of its attributes counts; none of another's."""
    roles = STOCK.get(place.name)
    if roles is None or not is_stock(layer):
        return []
    is_shape = place.name == "normalized_shape"  # which counts each dimension
    return [
        axis
        for (path, _, dim), (role, axis) in records.items()
        if path == place.module and role in roles and (not is_shape or dim == place.number)
    ]


def unite_attributes(
    elements: ChannelUnion, records: Records, find_module: Callable[[str], nn.Module]
) -> None:
    """Let the channels that follow a stock layer's attribute be as many as the layer's own, always."""
    followed = [(key, axis) for key, (_, axis) in records.items() if key[1].startswith(ATTRIBUTE)]
    for (path, name, number), axis in followed:
        place = AttributePlace(path, name.removeprefix(ATTRIBUTE), number)
        for own in list_own_axes(find_module(path), place, records):
            _let_agree(elements, axis, own, f"{place} counts other channels, too")


def _let_agree(elements: ChannelUnion, axis: Axis, own: Axis, reason: str) -> None:
    """Let the lengths of two axes change in proportion, by uniting channels where they would not."""
    ratio = Fraction(len(axis), len(own))
    if Count(Fraction(), ((ratio, own),)).counts(axis, elements):
        return
    first, second = _list_once(axis), _list_once(own)
    if first is None or second is None:
        elements.fix_all([axis, own], reason)
        return
    unit = gcd(len(first), len(second))
    parts = [elements.tie(channels, len(channels) // unit) for channels in (first, second)]
    elements.unite(*parts)


def _list_once(axis: Axis) -> Axis | None:
    """List each channel of an axis once, in order; None where some come more often than others."""
    _, places, times = np.unique(axis, return_index=True, return_counts=True)
    return axis[np.sort(places)] if len(set(times.tolist())) == 1 else None
