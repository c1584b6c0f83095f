"""Follow channels past what works on space: pooling, padding, resizing."""

import re
from collections.abc import Iterable

import numpy as np
from torch import Tensor, fx, nn

from elastic.widths.operations.interface import (
    Axes,
    NotFollowed,
    Tracker,
    get_argument,
    get_axes,
    get_input,
    get_operation_name,
    get_shape,
    get_value,
)
from elastic.widths.operations.joining import begin_constant
from elastic.widths.union import Axis

SPACE = "works on channels as if they were space"


def pool(tracker: Tracker, node: fx.Node) -> Axes | tuple[Axes, Axes]:
    """Follow pooling: it works on the last dimensions, of which its name says the number."""
    axes = _pass_beside(tracker, node, range(-_count_dimensions(tracker, node), 0))
    return axes if isinstance(get_value(node), Tensor) else (axes, axes)  # with the places of maxima


def transform(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow Fourier transforms of the last dimension, the last two (`fft2`), or those given."""
    name = get_operation_name(node)
    if name.endswith("n") and get_argument(node, 2, "dim") is None:
        raise NotFollowed("transforms all dimensions, channels too")
    dims = get_argument(node, 2, "dim", default=(-2, -1) if name.endswith("2") else -1)
    return _pass_beside(tracker, node, [dims] if isinstance(dims, int) else dims)


def unpool(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow what puts maxima back to their places."""
    x, indices = get_axes(get_input(node)), get_axes(get_argument(node, 1, "indices"))
    channel = len(get_shape(node)) - _count_dimensions(tracker, node) - 1
    tracker.fix([*x[channel + 1 :], *indices[channel + 1 :]], node, SPACE)
    if x[channel] is not None or indices[channel] is not None:
        tracker.unite(x[channel], indices[channel], node)
    return (*x[: channel + 1], *(None for _ in x[channel + 1 :]))


def pad(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow padding: it is given two numbers a dimension, the last one first.

    Constant channels that are added at the ends never change; those between them do.
    """
    if node.op == "call_module":
        layer = tracker.get_layer(node, nn.Module)
        padding = getattr(layer, "padding")  # noqa: B009
        is_constant = isinstance(layer, nn.modules.padding._ConstantPadNd)
    else:
        padding = get_argument(node, 1, "pad")
        is_constant = get_argument(node, 2, "mode", default="constant") == "constant"
    amounts = [get_value(amount) for amount in get_value(padding)]
    pairs = {
        -1 - i: pair for i, pair in enumerate(zip(amounts[::2], amounts[1::2], strict=True)) if any(pair)
    }
    x, axes_by_dim = get_axes(get_input(node)), dict[int, Axis]()
    for d, pair in pairs.items():
        if is_constant and (axis := x[d]) is not None and min(pair) >= 0:
            first, last = (begin_constant(tracker, node, size) for size in pair)
            axes_by_dim[d] = np.concatenate([first, axis, last])
    y = _pass_beside(tracker, node, [d for d in pairs if d not in axes_by_dim])
    return tuple(axes_by_dim.get(d, axis) for d, axis in enumerate(y, -len(y)))


def shuffle_pixels(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a pixel shuffle: neighbouring channels become one, of larger maps."""
    return (*_merge_channels(tracker, node, space=2), None, None)


def unshuffle_pixels(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow what takes a pixel shuffle back: each channel becomes several."""
    return (*_repeat_channels(tracker, node), None, None)


def unfold(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow windows: those of `F.unfold` stand in the place of channels, those of `x.unfold` come last."""
    if node.op != "call_method":
        return (*_repeat_channels(tracker, node), None)
    x = get_axes(get_input(node))
    dim = get_argument(node, 1, "dimension") % len(x)
    tracker.fix([x[dim]], node, SPACE)
    return (*x[:dim], None, *x[dim + 1 :], None)


def fold(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow what sums windows up to maps."""
    return (*_merge_channels(tracker, node, space=1), None, None)


def shuffle_channels(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a channel shuffle between a number of groups, which change alike."""
    x = get_axes(get_input(node))
    is_layer = node.op == "call_module"
    groups = (
        tracker.get_layer(node, nn.ChannelShuffle).groups if is_layer else get_argument(node, 1, "groups")
    )
    if x[1] is None:
        return x
    tracker.elements.tie(x[1], get_value(groups))
    return (x[0], x[1].reshape(get_value(groups), -1).T.reshape(-1), *x[2:])


def resize(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow resizing: it works on all dimensions but batch and channels."""
    return _pass_beside(tracker, node, range(2 - len(get_shape(node)), 0))


def _merge_channels(tracker: Tracker, node: fx.Node, space: int) -> Axes:
    """Give the axes up to that of channels, before so many of space, where neighbouring ones become one."""
    x = get_axes(get_input(node))
    channel = len(x) - 1 - space
    tracker.fix(x[channel + 1 :], node, SPACE)
    axis = x[channel]
    if axis is not None:
        axis = tracker.elements.tie_parts(list(axis.reshape(get_shape(node)[channel], -1).T))
    return (*x[:channel], axis)


def _repeat_channels(tracker: Tracker, node: fx.Node) -> Axes:
    """Give the axes up to that of channels, before two of space, where each becomes several."""
    x = get_axes(get_input(node))
    channel = len(x) - 3
    tracker.fix(x[channel + 1 :], node, SPACE)
    axis, size = x[channel], get_shape(node)[channel]
    return (*x[:channel], None if axis is None else np.repeat(axis, size // len(axis)))


def _count_dimensions(tracker: Tracker, node: fx.Node) -> int:
    """Count the dimensions that a layer or a function works on, which its name says."""
    if node.op == "call_module":
        name = type(tracker.get_layer(node, nn.Module)).__name__
    else:
        name = get_operation_name(node)
    digit = re.search("([123])d", name)
    if digit is None:
        raise NotFollowed("does not say on how many dimensions it works")
    return int(digit[1])


def _pass_beside(tracker: Tracker, node: fx.Node, dims: Iterable[int]) -> Axes:
    """Let all axes pass but those on the given dimensions, counted from the end, which are fixed."""
    source = get_input(node)
    value = get_value(node)
    after = (value if isinstance(value, Tensor) else value[0]).shape
    x, before = list(get_axes(source)), get_shape(source)
    for d in dims:
        is_same = before[d] == after[d]
        reason = SPACE if is_same else "changes the number of channels"
        tracker.fix([x[d]], node, reason)
        x[d] = None
    return tuple(x)
