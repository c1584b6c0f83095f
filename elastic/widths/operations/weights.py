"""Follow channels that a weight reads and writes, whoever applies it."""

from collections.abc import Sequence

import numpy as np
from torch import fx

from elastic.widths.operations.interface import (
    PRODUCTS,
    Axes,
    NotFollowed,
    Place,
    Tracker,
    get_argument,
    get_axes,
    get_input,
    get_operation_name,
    get_shape,
)
from elastic.widths.parameters import get_weight_name
from elastic.widths.union import Axis

KEEPS_ZEROS = (
    *(*PRODUCTS, "truediv", "div", "divide", "neg", "sign", "abs", "sum", "mean", "getitem"),
    *("clone", "contiguous", "to", "float"),
)
CHOICES = ("where", "masked_fill")
ZEROS = ("zeros_like", "zeros", "new_zeros")
SPACE = "works on channels as if they were space"


def locate_source(tracker: Tracker, weight: fx.Node) -> Place:
    """Find where a weight is stored, or what it is computed of, channel by channel.

    A weight that is standardised (arXiv 1903.10520), say, reads and writes the channels of the one that is
    stored. Unless zeros there stay zeros, each channel is felt by the others.

    Raises:
        NotFollowed: no tensor is known whose channels are the weight's.
    """
    try:
        return tracker.locate(weight)
    except NotFollowed:
        axes, shape = get_axes(weight), get_shape(weight)
        stored = list_stored(tracker, weight)
        # A mask, say, has the channels of the weight that it is multiplied with, too.
        for source in sorted(stored, key=lambda node: not is_weight(tracker, tracker.locate(node))):
            own = get_axes(source)
            if get_shape(source)[:2] == shape[:2] and _are_same(tracker, own[:2], axes[:2]):
                if not _keeps_zeros(weight, source):
                    tracker.mix(own[1:2], weight, "computes a weight from its channels")
                tracker.drop(axes)
                return tracker.locate(source)
        raise


def assign_data(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow `weight.data = …`: the weight has the channels of what is assigned."""
    weight, value = get_input(node), node.args[2]
    if node.args[1] != "data" or not isinstance(value, fx.Node) or get_shape(weight) != get_shape(value):
        raise NotFollowed("assigns to an attribute of a tensor")
    for axis, other in zip(get_axes(weight), get_axes(value), strict=True):
        tracker.unite(axis, other, node)
    tracker.drop(get_axes(weight))  # later uses read them again
    return ()


def is_weight(tracker: Tracker, place: Place) -> bool:
    """Tell whether a stored tensor is what its layer multiplies its input by."""
    return place.tensor == get_weight_name(tracker.get_module(place.module))


def list_stored(tracker: Tracker, weight: fx.Node) -> list[fx.Node]:
    """List the stored tensors that a computed one depends on, those with parametrizations among them."""
    pending, sources = [weight], dict[fx.Node, bool]()
    while pending:
        node = pending.pop()
        if node not in sources:
            sources[node] = _is_stored(tracker, node)
            pending += [] if sources[node] else node.all_input_nodes
    return [node for node, is_stored in sources.items() if is_stored]


def _is_stored(tracker: Tracker, node: fx.Node) -> bool:
    try:
        tracker.locate(node)
    except NotFollowed:
        return False
    return True


def _keeps_zeros(node: fx.Node, source: fx.Node) -> bool:
    """Tell whether what is computed of a stored tensor is surely zero where that is, or by its neighbours."""
    if node is source:
        return True
    name = get_operation_name(node).strip("_")
    if name in CHOICES:
        positions = (1, 2) if name == "where" and node.op == "call_function" else (0, 2)
        return all(_is_zero_with(get_argument(node, position), source) for position in positions)
    factors = node.args[: 2 if name in PRODUCTS else 1] if name in KEEPS_ZEROS else ()
    return any(isinstance(factor, fx.Node) and _keeps_zeros(factor, source) for factor in factors)


def _is_zero_with(value: object, source: fx.Node) -> bool:
    """Tell whether a value is zero, or surely is where a stored tensor is."""
    if not isinstance(value, fx.Node):
        return value == 0
    return get_operation_name(value) in ZEROS or _keeps_zeros(value, source)


def _are_same(tracker: Tracker, first: Sequence[Axis | None], second: Sequence[Axis | None]) -> bool:
    """Tell whether axes have the same channels, as those of factors have that an operation has united."""
    pairs = zip(first, second, strict=True)
    return all(
        one is two is None
        or (
            one is not None
            and two is not None
            and np.array_equal(tracker.elements.represent(one), tracker.elements.represent(two))
        )
        for one, two in pairs
    )


def read_and_write(
    tracker: Tracker,
    node: fx.Node,
    source: Axis | None,
    weight: Place,
    bias: Place | None,
    groups: int = 1,
    is_depthwise: bool = False,
) -> Axis:
    """Let a weight (out, in / groups, …) read channels and write others; give the axis that it writes.

    Where it is depthwise, each channel is a group, and gives a run of as many outputs.
    """
    written = tracker.begin(*weight, "depthwise" if is_depthwise else "out")
    if is_depthwise:
        copies = len(written) // groups
        tracker.unite(
            written, np.repeat(source, copies) if source is not None and copies > 1 else source, node
        )
    else:
        if groups > 1:
            tracker.elements.tie(written, groups)
            source = None if source is None else tracker.elements.tie(source, groups)
        tracker.record(*weight, 1, "in", source)
    if bias is not None:
        tracker.record(*bias, 0, "per_channel", written)
    return written


def read_and_write_transposed(
    tracker: Tracker,
    node: fx.Node,
    source: Axis | None,
    weight: Place,
    bias: Place | None,
    groups: int,
    copies: int = 0,
) -> Axis:
    """Let a weight (in, out / groups, …), as of a transposed convolution, read channels and write others.

    Args:
        copies: how many outputs each channel gives where it is a group of its own, 0 where it is none.
    """
    if copies:
        read = tracker.begin(*weight, "depthwise")
        tracker.unite(read, source, node)
        written = np.repeat(read, copies)
    else:
        if source is not None:
            tracker.elements.tie(source, groups)
        tracker.record(*weight, 0, "in", source)
        written = np.tile(tracker.begin(*weight, "out", 1), groups)
    if bias is not None:
        tracker.record(*bias, 0, "per_channel", written)
    return written
