"""Follow channels through layers that hold tensors: convolutions, linear layers, norms."""

from typing import cast

from torch import fx, nn

from elastic.widths.operations.interface import (
    LAYER,
    Axes,
    Place,
    Tracker,
    get_axes,
    get_input,
)
from elastic.widths.operations.weights import SPACE, read_and_write, read_and_write_transposed
from elastic.widths.union import Axis


def convolve(tracker: Tracker, node: fx.Node) -> Axes:
    """Write new channels and read the input's; where there are groups, both change in all groups alike."""
    layer, path = tracker.get_layer(node, nn.modules.conv._ConvNd), str(node.target)
    x = get_axes(get_input(node))
    channel = len(x) - len(layer.kernel_size) - 1  # 0 where there is no batch
    tracker.fix(x[channel + 1 :], node, SPACE)
    weight, bias = Place(path, "weight"), Place(path, "bias")
    is_depthwise = 1 < layer.groups == layer.in_channels
    written = read_and_write(tracker, node, x[channel], weight, bias, layer.groups, is_depthwise)
    return (*x[:channel], written, *(None for _ in layer.kernel_size))


def convolve_transposed(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a transposed convolution: its weight lies the other way round."""
    layer, path = tracker.get_layer(node, nn.modules.conv._ConvTransposeNd), str(node.target)
    x = get_axes(get_input(node))
    channel = len(x) - len(layer.kernel_size) - 1  # 0 where there is no batch
    tracker.fix(x[channel + 1 :], node, SPACE)
    copies = layer.out_channels // layer.groups if 1 < layer.groups == layer.in_channels else 0
    weight, bias = Place(path, "weight"), Place(path, "bias")
    written = read_and_write_transposed(tracker, node, x[channel], weight, bias, layer.groups, copies)
    return (*x[:channel], written, *(None for _ in layer.kernel_size))


def project(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a linear layer: it reads and writes the last dimension."""
    path, x = str(node.target), get_axes(get_input(node))
    written = read_and_write(tracker, node, x[-1], Place(path, "weight"), Place(path, "bias"))
    return (*x[:-1], written)


def embed(tracker: Tracker, node: fx.Node) -> Axes:
    """Write the channels of an embedding, which reads no channels but numbers of its rows."""
    layer, x = tracker.get_layer(node, nn.Embedding), get_axes(get_input(node))
    tracker.fix(x, node, "takes channels for numbers of its rows")
    written = tracker.begin(str(node.target), "weight", "out", 1)
    if layer.max_norm is not None:
        tracker.fix([written], node, "scales rows by all of their channels (max_norm)")
    if layer.sparse:
        tracker.fix([written], node, "has sparse gradients, whose channels cannot change")
    return (*x, written)


def normalize_channels(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow batch and instance norm: they hold one scalar (of each kind) a channel."""
    x = get_axes(get_input(node))
    tracker.fix([x[0], *x[2:]], node, SPACE)
    for tensor in _list_norm_tensors(tracker.get_layer(node, nn.Module)):
        tracker.record(str(node.target), tensor, 0, "per_channel", x[1])
    return x


def rectify(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow PReLU: it holds one scalar a channel, or one for all."""
    x = get_axes(get_input(node))
    if tracker.get_layer(node, nn.PReLU).num_parameters > 1:
        tracker.record(str(node.target), "weight", 0, "per_channel", x[1])
    return x


def normalize_groups(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow group norm: whole groups come and go, which the others do not feel, or all change alike."""
    layer, x = tracker.get_layer(node, nn.GroupNorm), get_axes(get_input(node))
    tracker.fix(x[2:], node, SPACE)
    is_joined = join_or_tie(tracker, node, x[1], layer.num_groups)
    for tensor in _list_norm_tensors(layer):
        tracker.record(str(node.target), tensor, 0, "depthwise" if is_joined else "per_channel", x[1])
    return x


def join_or_tie(tracker: Tracker, node: fx.Node, axis: Axis | None, groups: int, size: object = None) -> bool:
    """Let whole groups of a norm come and go, or else all change alike; tell which, see `Tracker.join`."""
    if axis is None or tracker.join(axis, groups, node, size):
        return axis is not None
    tracker.elements.tie(axis, groups)
    tracker.mix([axis], node, "normalises over its channels")
    return False


def normalize_layer(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow layer norm (and RMS norm): its tensors have all dimensions that it normalises over."""
    layer, x = tracker.get_layer(node, nn.Module), get_axes(get_input(node))
    axes = x[-len(cast(nn.LayerNorm, layer).normalized_shape) :]  # or an RMSNorm
    tracker.mix(axes, node, "normalises over its channels")
    for dim, axis in enumerate(axes):
        for tensor in _list_norm_tensors(layer):
            tracker.record(str(node.target), tensor, dim, "per_channel", axis)
    return x


def _list_norm_tensors(layer: nn.Module) -> list[str]:
    """List the tensors of a norm; a norm without any still counts its channels in its attributes."""
    names = ("weight", "bias", "running_mean", "running_var")
    return [name for name in names if getattr(layer, name, None) is not None] or [LAYER]
