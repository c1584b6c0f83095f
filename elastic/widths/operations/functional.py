"""Follow functions that are given the tensors which layers hold: F.conv2d, F.linear, F.batch_norm, ….

Sizes that a layer's own attributes give are taken to be these attributes, which surgery keeps; elsewhere a
size that is written as a number stays, and with it the channels that it counts.
"""

from torch import fx

from elastic.widths.operations.counts import get_count, list_counts
from elastic.widths.operations.interface import (
    Axes,
    NotFollowed,
    Place,
    Tracker,
    get_argument,
    get_axes,
    get_input,
    get_shape,
    get_value,
    list_axes,
)
from elastic.widths.operations.layers import join_or_tie
from elastic.widths.operations.weights import (
    SPACE,
    is_weight,
    list_stored,
    locate_source,
    read_and_write,
    read_and_write_transposed,
)
from elastic.widths.union import Axis


def convolve_with(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a convolution with a weight that the model holds."""
    groups, kernel = get_argument(node, 6, "groups", default=1), get_argument(node, 1, "weight")
    shape = get_shape(kernel)
    is_depthwise = get_value(groups) > 1 == shape[1]
    if is_depthwise and shape[0] == get_value(groups) and _is_spread(tracker, kernel):
        return _filter(tracker, node, groups)
    if _is_single(tracker, node):
        return _filter_single(tracker, node)
    x, weight = _read_weight(tracker, node, is_depthwise)
    channel = len(x) - len(shape) + 1  # 0 where there is no batch
    _follow_groups(tracker, node, groups, x[channel], is_depthwise)
    tracker.fix(x[channel + 1 :], node, SPACE)
    written = read_and_write(tracker, node, x[channel], weight, None, get_value(groups), is_depthwise)
    _add_bias(tracker, node, written)
    return (*x[:channel], written, *(None for _ in shape[2:]))


def deform_with(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow torchvision's deformable convolution, whose input comes in groups with offsets of their own."""
    x, weight = _read_weight(tracker, node)
    # As the compiled function takes them, by position alone.
    offset, mask, groups, offset_groups = (get_argument(node, position) for position in (2, 3, 11, 12))
    tracker.fix([*get_axes(offset), *get_axes(mask)], node, "moves as many places")
    if x[1] is not None:
        tracker.elements.tie(x[1], get_value(offset_groups))
    written = read_and_write(tracker, node, x[1], weight, None, get_value(groups))
    _add_bias(tracker, node, written, position=4)
    return (x[0], written, None, None)


def _is_spread(tracker: Tracker, weight: fx.Node) -> bool:
    """Tell whether a weight is one kernel that is spread over as many channels as there are."""
    channels = get_axes(weight)[0]
    own = [axis for source in list_stored(tracker, weight) for axis in list_axes(get_axes(source))]
    return channels is not None and not tracker.elements.includes(own, [channels])


def _is_single(tracker: Tracker, node: fx.Node) -> bool:
    """Tell whether a weight is one kernel, for images of one channel, that is no layer's."""
    weight, has_bias = get_argument(node, 1, "weight"), get_argument(node, 2, "bias") is not None
    is_layers = any(is_weight(tracker, tracker.locate(source)) for source in list_stored(tracker, weight))
    return get_shape(weight)[:2].numel() == 1 and not has_bias and not is_layers


def _filter_single(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a filter of images of one channel; those of several may lie in the batch."""
    x = get_axes(get_input(node))
    channel = len(x) - len(get_shape(get_argument(node, 1, "weight"))) + 1
    tracker.fix(x[channel:], node, "filters a single channel")
    return (*x[:channel], *(None for _ in x[channel:]))


def _filter(tracker: Tracker, node: fx.Node, groups: object) -> Axes:
    """Follow a filter of each map by itself (a blur, say), which has no channels of its own."""
    x, weight = get_axes(get_input(node)), get_argument(node, 1, "weight")
    channel = len(x) - len(get_shape(weight)) + 1
    _follow_groups(tracker, node, groups, x[channel], True)
    tracker.fix(x[channel + 1 :], node, SPACE)
    tracker.unite(x[channel], get_axes(weight)[0], node)
    if isinstance(bias := get_argument(node, 2, "bias"), fx.Node):
        _record(tracker, node, bias, 0, x[channel])
    return (*x[: channel + 1], *(None for _ in x[channel + 1 :]))


def convolve_transposed_with(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a transposed convolution with a weight that the model holds."""
    groups, shape = get_argument(node, 6, "groups", default=1), get_shape(get_argument(node, 1, "weight"))
    is_depthwise = 1 < get_value(groups) == shape[0]
    x, weight = _read_weight(tracker, node, is_depthwise)
    channel = len(x) - len(shape) + 1  # 0 where there is no batch
    _follow_groups(tracker, node, groups, x[channel], is_depthwise)
    tracker.fix(x[channel + 1 :], node, SPACE)
    copies = shape[1] if is_depthwise else 0
    written = read_and_write_transposed(tracker, node, x[channel], weight, None, get_value(groups), copies)
    _add_bias(tracker, node, written)
    return (*x[:channel], written, *(None for _ in shape[2:]))


def _follow_groups(
    tracker: Tracker, node: fx.Node, groups: object, axis: Axis | None, is_depthwise: bool
) -> None:
    """Let the number of groups follow the channels where each of them is one; else it stays."""
    if not is_depthwise:
        tracker.fix(get_count(groups).axes, node, "computes with the number of channels")
    elif not get_count(groups).counts(axis, tracker.elements) and not tracker.follow_size(groups, axis):
        tracker.fix([axis], node, "fixes the number of groups")


def project_with(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a linear map with a weight that the model holds."""
    x, weight = _read_weight(tracker, node)
    written = read_and_write(tracker, node, x[-1], weight, None)
    _add_bias(tracker, node, written)
    return (*x[:-1], written)


def normalize_channels_with(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow batch and instance norm: what they are given holds one scalar a channel."""
    x = get_axes(get_input(node))
    tracker.mix([x[0], *x[2:]], node, "normalises over its channels")
    for position, name in enumerate(("running_mean", "running_var", "weight", "bias"), 1):
        _record(tracker, node, get_argument(node, position, name), 0, x[1])
    return x


def normalize_groups_with(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow group norm: whole groups come and go where their number can follow; else all change alike."""
    x, groups = get_axes(get_input(node)), get_argument(node, 1, "num_groups")
    tracker.fix(x[2:], node, SPACE)
    join_or_tie(tracker, node, x[1], get_value(groups), groups)
    for position, name in ((2, "weight"), (3, "bias")):
        _record(tracker, node, get_argument(node, position, name), 0, x[1])
    return x


def normalize_layer_with(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow layer norm over the last dimensions, of given sizes."""
    x, sizes = get_axes(get_input(node)), list_counts(get_argument(node, 1, "normalized_shape"))
    tensors = [get_argument(node, position, name) for position, name in ((2, "weight"), (3, "bias"))]
    axes = x[-len(sizes) :]
    shape = get_argument(node, 1, "normalized_shape")
    numbers = iter(shape if isinstance(shape, tuple | list) else [None] * len(sizes))
    tracker.mix(axes, node, "normalises over its channels")
    for dim, axis in enumerate(axes):
        for tensor in tensors:
            _record(tracker, node, tensor, dim, axis)
    for axis, size in zip(axes, sizes, strict=True):
        if axis is not None and not tracker.follow_size(next(numbers), axis):
            is_counted = size.counts(axis, tracker.elements)
            tracker.fix([] if is_counted else [axis, *size.axes], node, "fixes the number of channels")
    return x


def rectify_with(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow PReLU with a scalar a channel, or one for all."""
    x, weight = get_axes(get_input(node)), get_argument(node, 1, "weight")
    if get_shape(weight).numel() > 1:
        _record(tracker, node, weight, 0, x[1])
    return x


def _read_weight(tracker: Tracker, node: fx.Node, is_depthwise: bool = False) -> tuple[Axes, Place]:
    """Read the axes of the input, and where the weight is stored."""
    place = locate_source(tracker, get_argument(node, 1, "weight"))
    if (
        not is_weight(tracker, place) and not is_depthwise
    ):  # surgery knows by the name what is no scalar a channel
        raise NotFollowed(f"is given '{place.tensor}', one of several weights of a module")
    return get_axes(get_input(node)), place


def _add_bias(tracker: Tracker, node: fx.Node, written: Axis, position: int = 2) -> None:
    """Let a bias have an entry for each channel that is written, be it stored or computed."""
    bias = get_argument(node, position, "bias")
    if bias is None:
        return
    try:
        tracker.record(*tracker.locate(bias), 0, "per_channel", written)
    except NotFollowed:
        tracker.unite(get_axes(bias)[0], written, node)


def _record(tracker: Tracker, node: fx.Node, tensor: fx.Node | None, dim: int, axis: Axis | None) -> None:
    """Record that a tensor has an entry a channel, or let its channels agree where it is computed."""
    if isinstance(tensor, fx.Node) and (own := get_axes(tensor)) and own[dim] is not None:
        if axis is None:
            tracker.drop([own[dim]])
        else:
            tracker.unite(own[dim], axis, node)
