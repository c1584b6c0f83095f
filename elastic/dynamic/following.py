"""Follow the maps of a layer, which may be off, to the layers that read them."""

from dataclasses import dataclass, field
from typing import NamedTuple, cast

from torch import Tensor, fx, nn

from elastic.dynamic.calls import INSTANCE_NORM, find_norm, require_one_call
from elastic.dynamic.zeros import (
    READS_SHAPE,
    RESHAPES,
    crops_space,
    keeps_zeros,
    list_joined,
    makes_constants,
    name_operation,
    works_in_place,
)
from elastic.widths.hooks import is_look
from elastic.widths.operations.interface import PRODUCTS
from elastic.widths.tracing import BATCH_NORM, get_layer, get_operation_name

RESIZES = {*RESHAPES, "mean"}  # behind these, maps have other dimensions


class Maps(NamedTuple):
    """Say what a node has of maps that may be off.

    Attributes:
        joined: whether they lie among others.
        resized: whether they have other dimensions than their gates.
        nonzero: whether those that are off may be something else than zero, until a gate makes them so again.
    """

    joined: bool = False
    resized: bool = False
    nonzero: bool = False


@dataclass
class Followed:
    """Hold what becomes of maps in one graph.

    Attributes:
        maps: what each node has of them.
        readers: the layers that read them.
        followers: the layers between that make a constant of a map of zeros.
        ends: the nodes behind which maps are to be gated.
        others: the nodes that do something else with them.
    """

    maps: dict[fx.Node, Maps] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)
    ends: list[fx.Node] = field(default_factory=list)
    others: list[fx.Node] = field(default_factory=list)

    def list_zeros(self) -> list[fx.Node]:
        """List the nodes whose maps are zeros where they are off."""
        return [node for node, maps in self.maps.items() if not maps.nonzero]


def follow_maps(traced: fx.GraphModule, writer: fx.Node, axis: int) -> Followed:
    """Follow maps in the graph of their writer's call, through what keeps zeros, also joined with others.

    A depthwise convolution makes a constant of a map of zeros, its bias, and so does a norm of each map by
    itself, a sigmoid or the sum with a parameter; a gate behind it makes that zero again, if all maps are
    gated. So they are followed on from there. Where channels lie last, layers of each map, and joins, take
    something else for a map: they are none of them.

    Args:
        axis: of channels, 1 or -1.

    Raises:
        StructureError: a layer of each map is called more than once.
    """
    dims = cast(Tensor, traced.get_submodule(str(writer.target)).weight).dim()
    end = find_norm(traced, writer)
    followed = Followed({end: Maps()}, ends=[end])
    for node in writer.graph.nodes:
        sources = [source for source in node.all_input_nodes if source in followed.maps]
        if sources and get_operation_name(node) not in READS_SHAPE and not is_look(node):
            _follow(traced, followed, node, sources, axis, dims)
    return followed


def _follow(
    traced: fx.GraphModule, followed: Followed, node: fx.Node, sources: list[fx.Node], axis: int, dims: int
) -> None:
    """Note what a node does with the maps of its sources."""
    maps, layer = followed.maps, get_layer(traced, node)
    joined, resized, is_nonzero = map(any, zip(*(maps[source] for source in sources), strict=True))
    is_product = name_operation(traced, node) in PRODUCTS
    if not (joined or resized) and _changes_entries(traced, followed, node):
        adds_maps = list(node.args) == sources and len(sources) == 2  # zeros to zeros
        maps[node] = Maps(nonzero=is_nonzero or not adds_maps)
        return
    if not (is_product and any(not maps[source].nonzero for source in sources)):
        ends = (source for source in sources if maps[source].nonzero and source not in followed.ends)
        followed.ends.extend(ends)
    if axis == 1 and _treats_each_map(layer) and not joined:
        followed.followers.append(require_one_call(traced, str(node.target)))
        end = find_norm(traced, node)
        followed.ends.append(end)
        maps[end] = Maps(resized=resized)
    elif isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
        followed.readers.append(str(node.target))
    elif axis == 1 and sum(part in maps for part in list_joined(node, dims)) == 1:
        maps[node] = Maps(joined=True)
    elif keeps_zeros(traced, node) or (axis == 1 and not resized and crops_space(node, dims)):
        maps[node] = Maps(joined, resized or name_operation(traced, node) in RESIZES)
    else:
        followed.others.append(node)


def _changes_entries(traced: fx.GraphModule, followed: Followed, node: fx.Node) -> bool:
    """Tell whether a node may make a constant of zeros, and of nothing that is read elsewhere, too."""
    if keeps_zeros(traced, node) or not makes_constants(traced, node, followed.maps):
        return False
    return not works_in_place(traced, node) or all(len(source.users) == 1 for source in followed.maps)


def _treats_each_map(layer: nn.Module | None) -> bool:
    """Tell whether a layer makes one map of each, but something of zeros."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.groups == layer.in_channels == layer.out_channels > 1
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups > 1  # of whole groups
    return isinstance(layer, BATCH_NORM | INSTANCE_NORM)
