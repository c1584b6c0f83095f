"""Find what else is to be silent where a layer's channel is: whatever makes a constant of a map of zeros.

A norm makes its shift of it, and a depthwise convolution its bias. Left alone, a closed channel goes on as a
constant: it cannot be told from one that is written, and behind zero padding it does not go at all.
"""

from collections import Counter

from torch import fx, nn

from elastic.widths.operations import TABLE
from elastic.widths.operations.joining import broadcast, convert, pass_on, scale
from elastic.widths.operations.layers import rectify
from elastic.widths.operations.spatial import pad, pool, resize
from elastic.widths.parameters import get_weight_name
from elastic.widths.tracing import BATCH_NORM, get_layer, make_meta_copy, trace_modes
from elastic.widths.width import Slot, Widths

# What makes one map of each.
PASSES = (broadcast, convert, pass_on, scale, rectify, pool, pad, resize)


def find_companions(model: nn.Module, widths: Widths) -> dict[str, list[tuple[str, str]]]:
    """Find, for each layer, the tensors that hold a scalar for each of its channels: (layer, name).

    They are its bias, and those of norms and depthwise convolutions that are given its maps alone.
    """
    replica = make_meta_copy(model)
    graph = trace_modes(replica, *widths.example)[0]  # in training, where all is called
    paths = {node: path for node in graph.nodes if (path := _find_path(replica, node))}
    calls = Counter(paths.values())
    leaders: dict[str, str] = {}
    for node, path in paths.items():
        if calls[path] == 1 and _treats_each_map(get_layer(replica, node)):
            source = paths.get(_find_source(replica, node))
            if source is not None and calls[source] == 1:
                leaders[path] = leaders.get(source, source)
    slots = [slot for width in widths.values() for slot in width.slots]
    writers = {slot.module: slot for slot in slots if slot.role == "out"}
    scalars = {(slot.module, slot.tensor): slot for slot in slots if slot.role == "per_channel"}
    companions: dict[str, list[tuple[str, str]]] = {path: [(path, "bias")] for path in writers}
    for path, leader in leaders.items():
        of_norm = isinstance(replica.get_submodule(path), BATCH_NORM)
        for name in ("weight", "bias") if of_norm else ("bias",):
            if _lie_alike(writers.get(leader), scalars.get((path, name))):
                companions[leader].append((path, name))
    return companions


def _find_path(replica: nn.Module, node: fx.Node) -> str | None:
    """Find the layer that a node calls, or whose weight alone a function is given."""
    if node.op == "call_module":
        return str(node.target)
    weights = [source for source in node.all_input_nodes if source.op == "get_attr"]
    places = [str(weight.target).rpartition(".")[::2] for weight in weights]
    owners = {path for path, name in places if name == get_weight_name(replica.get_submodule(path))}
    return owners.pop() if node.op == "call_function" and len(owners) == 1 else None


def _find_source(replica: nn.Module, node: fx.Node) -> fx.Node:
    """Find what gives the maps that a node is given, through all that makes one map of each."""
    source = node.args[0] if node.args else node
    while isinstance(source, fx.Node) and len(source.all_input_nodes) == 1:
        if TABLE.find(get_layer(replica, source), source) not in PASSES:
            return source
        source = source.all_input_nodes[0]
    return source if isinstance(source, fx.Node) else node


def _treats_each_map(layer: nn.Module | None) -> bool:
    """Tell whether a layer makes one map of each, by a batch norm or a depthwise convolution."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.groups == layer.in_channels == layer.out_channels > 1
    return isinstance(layer, BATCH_NORM)


def _lie_alike(written: Slot | None, scalar: Slot | None) -> bool:
    """Tell whether there is a scalar for each channel that a layer writes, or several for all of them."""
    if written is None or scalar is None:
        return False
    return scalar.layout == written.layout * (len(scalar.layout) // len(written.layout))
