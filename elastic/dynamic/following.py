"""Follow the maps of a layer, which may be off, to the layers that read them."""

from typing import NamedTuple, cast

from torch import Tensor, fx, nn

from elastic.dynamic.calls import INSTANCE_NORM, find_norm, require_one_call
from elastic.dynamic.products import ends_in_products
from elastic.dynamic.zeros import READS_SHAPE, keeps_zeros, list_joined
from elastic.errors import StructureError
from elastic.widths.tracing import BATCH_NORM, get_layer, get_operation_name


class Followed(NamedTuple):
    """Name the layers that read maps, and those between that make a constant of a map of zeros."""

    readers: tuple[str, ...]
    followers: tuple[str, ...]


def follow_maps(traced: fx.GraphModule, writer: fx.Node, axis: int) -> Followed:
    """Follow maps through whatever keeps zeros, also where they are joined with others.

    A depthwise convolution makes a constant of a map of zeros, its bias, and so does a norm of each map by
    itself; a gate behind it makes that zero again, if all maps are gated. So they are followed on from there.
    Where channels lie last, such layers, and joins, take something else for a map: there they are refused.

    Args:
        axis: of channels, 1 or -1.

    Raises:
        StructureError: something else is made of them.
    """
    readers, followers, others = [], [], []
    dims = cast(Tensor, traced.get_submodule(str(writer.target)).weight).dim()
    is_joined = {find_norm(traced, writer): False}  # with other maps, by node; all nodes that keep zeros
    for node in traced.graph.nodes:
        sources = [source for source in node.all_input_nodes if source in is_joined]
        layer, joined = get_layer(traced, node), any(is_joined[source] for source in sources)
        if not sources or get_operation_name(node) in READS_SHAPE:
            continue
        if axis == 1 and _treats_each_map(layer) and not joined:
            followers.append(require_one_call(traced, str(node.target)))
            is_joined[find_norm(traced, node)] = False
        elif isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            readers.append(str(node.target))
        elif axis == 1 and sum(part in is_joined for part in list_joined(node, dims)) == 1:
            is_joined[node] = True
        elif keeps_zeros(traced, node):
            is_joined[node] = joined
        else:
            others.append(node)
    for other in others:
        if not ends_in_products(traced, other, is_joined):
            raise StructureError(f"{other.name} does more with its maps than to read them")
    return Followed(tuple(dict.fromkeys(readers)), tuple(followers))


def _treats_each_map(layer: nn.Module | None) -> bool:
    """Tell whether a layer makes one map of each, but something of zeros."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.groups == layer.in_channels == layer.out_channels > 1
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups == layer.num_channels
    return isinstance(layer, BATCH_NORM | INSTANCE_NORM)
