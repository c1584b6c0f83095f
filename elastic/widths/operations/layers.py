"""Follow channels through layers that hold tensors: convolutions, linear layers, norms."""

import numpy as np
from torch import fx, nn

from elastic.widths.operations.interface import LAYER, Axes, Tracker, get_axes, get_input


def convolve(tracker: Tracker, node: fx.Node) -> Axes:
    """Write new channels and read the input's; where there are groups, both change in all groups alike."""
    layer, name, x = (
        tracker.get_layer(node, nn.modules.conv._ConvNd),
        str(node.target),
        get_axes(get_input(node)),
    )
    channel = len(x) - len(layer.kernel_size) - 1  # 0 where there is no batch
    source = x[channel]
    tracker.fix(x[channel + 1 :], node, "works on channels as if they were space")
    if 1 < layer.groups == layer.in_channels:
        written = tracker.begin(name, "weight", "depthwise")
        # Each input channel gives a run of as many output channels.
        multiplier = layer.out_channels // layer.groups
        tracker.unite(written, None if source is None else np.repeat(source, multiplier), node)
    else:
        written = tracker.begin(name, "weight", "out")
        if layer.groups > 1:
            tracker.elements.tie(written, layer.groups)
            source = None if source is None else tracker.elements.tie(source, layer.groups)
        tracker.record(name, "weight", 1, "in", source)
    tracker.record(name, "bias", 0, "per_channel", written)
    return (*x[:channel], written, *(None for _ in layer.kernel_size))


def project(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a linear layer: it reads and writes the last dimension."""
    name, x = str(node.target), get_axes(get_input(node))
    written = tracker.begin(name, "weight", "out")
    tracker.record(name, "bias", 0, "per_channel", written)
    tracker.record(name, "weight", 1, "in", x[-1])
    return (*x[:-1], written)


def normalize_channels(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow batch and instance norm: they hold one scalar (of each kind) a channel."""
    x = get_axes(get_input(node))
    tracker.fix([x[0], *x[2:]], node, "works on channels as if they were space")
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
    """Follow group norm: its groups grow and shrink alike, or in number where each is one channel."""
    layer, x = tracker.get_layer(node, nn.GroupNorm), get_axes(get_input(node))
    single = layer.num_groups == layer.num_channels > 1
    tracker.fix(x[2:], node, "works on channels as if they were space")
    if x[1] is not None and not single:
        tracker.elements.tie(x[1], layer.num_groups)
        tracker.elements.mix(x[1], f"{node.target} (GroupNorm) normalises over its channels")
    for tensor in _list_norm_tensors(layer):
        tracker.record(str(node.target), tensor, 0, "depthwise" if single else "per_channel", x[1])
    return x


def normalize_layer(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow layer norm: its tensors have all dimensions that it normalises over."""
    layer, x = tracker.get_layer(node, nn.LayerNorm), get_axes(get_input(node))
    for dim, axis in enumerate(x[-len(layer.normalized_shape) :]):
        tracker.elements.mix(axis, f"{node.target} (LayerNorm) normalises over its channels")
        for tensor in _list_norm_tensors(layer):
            tracker.record(str(node.target), tensor, dim, "per_channel", axis)
    return x


def _list_norm_tensors(layer: nn.Module) -> list[str]:
    """List the tensors of a norm; a norm without any still counts its channels in its attributes."""
    names = ("weight", "bias", "running_mean", "running_var")
    return [name for name in names if getattr(layer, name, None) is not None] or [LAYER]
