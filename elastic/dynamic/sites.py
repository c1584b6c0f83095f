"""Find the kernels that can be switched off: those whose maps need not be read where they are zero."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from torch import fx, nn

from elastic.dynamic.sums import find_addend
from elastic.dynamic.zeros import (
    MAKES_ANEW,
    PRODUCTS,
    READS_SHAPE,
    keeps_zeros,
    name_operation,
    works_in_place,
)
from elastic.errors import StructureError
from elastic.widths.discovery import Width, Widths
from elastic.widths.tracing import BATCH_NORM, get_layer, get_operation_name, list_graphs


@dataclass(frozen=True)
class Site:
    """Name the layers that kernels are in: who computes them, who reads or follows their maps.

    Maps that end a branch have no readers: where they are off, they are left out of a sum.
    """

    writer: str
    readers: tuple[str, ...]
    depthwise: tuple[str, ...]  # convolutions of each map by itself
    width: str | None = None  # by its name; None for maps that end a branch


def find_sites(
    traced: fx.GraphModule, widths: Widths, names: Iterable[str] | None = None, branches: bool = False
) -> list[Site]:
    """Find the sites of the widths that are named, or of all that have one.

    Args:
        branches: whether to find those that end a branch, too.

    Raises:
        StructureError: a width that is named has none, or there is no site.
    """
    ends = find_branch_sites(traced) if branches else []
    if names is not None:
        names = [names] if isinstance(names, str) else dict.fromkeys(names)
        named = [find_site(traced, widths[name]) for name in names]
        if not named and not ends:
            raise StructureError("no width is named whose kernels could be switched off: name one")
        return named + ends
    sites, refusals = [], []
    for width in widths.values():
        try:
            sites.append(find_site(traced, width))
        except StructureError as refusal:
            refusals.append(refusal)
    if refusals and not sites and not ends:
        raise refusals[0]
    return sites + ends


def find_site(traced: fx.GraphModule, width: Width) -> Site:
    """Find where a width's kernels are.

    Of several layers that write a width one may be switched if its maps are multiplied by the others'
    (squeeze and excitation), not added: where they are off, so are the products.

    Raises:
        StructureError: they cannot be switched off; it says why.
    """
    writers = sorted({slot.module for slot in width.slots_with("out")})
    reason = width.mixed or "no layer writes them"
    for writer in writers if width.mixed is None else ():
        try:
            return _find_site(traced, width, writer, len(writers) == 1)
        except StructureError as error:
            reason = str(error)
    if len(writers) > 1 and width.mixed is None:
        reason = f"its maps are sums, {' and '.join(writers[:2])} write them"
    raise StructureError(f"the kernels of '{width.name}' cannot be switched off: {reason}")


def _find_site(traced: fx.GraphModule, width: Width, writer: str, is_alone: bool) -> Site:
    """Find the site of the kernels of one layer that writes a width, alone or among others."""
    call = _find_call(traced, width, writer)
    readers, depthwise = _follow_maps(traced, call)
    slots = {slot.module for slot in width.slots_with("in")}
    if others := [reader for reader in readers if reader not in slots]:
        raise StructureError(f"{others[0]} does not read them as its channels")
    for reader in () if is_alone else readers:  # in another call it may read another layer's maps
        _require_one_call(traced, reader)
    return Site(writer, readers, depthwise, width.name)


def find_branch_sites(traced: fx.GraphModule) -> list[Site]:
    """Find the convolutions that end a branch: their maps, behind their norm, are added to others.

    A projection in the other branch, which reads what the block reads, is none of them.
    """
    sites = []
    for call in traced.graph.nodes:
        layer = get_layer(traced, call)
        if type(layer) is not nn.Conv2d or layer.groups > 1 or not call.args:
            continue
        end, source = find_norm(traced, call), call.args[0]
        is_added = len(end.users) == 1 and find_addend(next(iter(end.users)), end) is not None
        reads_alone = isinstance(source, fx.Node) and len(source.users) == 1
        is_called_once = len(find_calls(traced, str(end.target))) == 1
        if is_added and reads_alone and is_called_once:
            with suppress(StructureError):  # it is called more often, or otherwise in training
                sites.append(Site(_require_one_call(traced, str(call.target)), (), ()))
    return sites


def find_calls(traced: fx.GraphModule, path: str) -> list[fx.Node]:
    """Find the nodes that call a layer in evaluation."""
    return list(traced.graph.find_nodes(op="call_module", target=path))


def find_norm(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Find the batch norm that alone reads a layer; without one it is the layer."""
    users = list(node.users)
    is_normed = len(users) == 1 and isinstance(get_layer(traced, users[0]), BATCH_NORM)
    return users[0] if is_normed else node


def _find_call(traced: fx.GraphModule, width: Width, writer: str) -> fx.Node:
    """Find the one call of an ordinary convolution that writes a width, and nothing but the width."""
    (call,) = find_calls(traced, _require_one_call(traced, writer))
    layer = get_layer(traced, call)
    if type(layer) is not nn.Conv2d or layer.groups > 1:
        raise StructureError(f"{writer} ({type(layer).__name__}) is no ordinary convolution")
    if not call.args:
        raise StructureError(f"{writer} is given what it reads by name")
    if width.size != layer.out_channels:
        raise StructureError(f"it is a part of the channels of {writer}")
    return call


def _follow_maps(traced: fx.GraphModule, writer: fx.Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Follow maps, through whatever keeps zeros, to their readers and the depthwise layers between.

    A depthwise convolution makes a constant of a map of zeros, its bias; a gate behind it makes that zero
    again. So the maps are followed on from there.
    """
    readers: list[str] = []
    depthwise: list[str] = []
    others: list[fx.Node] = []
    ends = [find_norm(traced, writer)]
    zeros = set[fx.Node]()
    while ends:
        zeros.add(end := ends.pop())
        for user in end.users:
            layer = get_layer(traced, user)
            if _is_depthwise(layer):
                depthwise.append(_require_one_call(traced, str(user.target)))
                ends.append(find_norm(traced, user))
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                readers.append(str(user.target))
            elif keeps_zeros(traced, user):
                ends.append(user)
            elif get_operation_name(user) not in READS_SHAPE:
                others.append(user)
    for other in others:
        if not _ends_in_products(traced, other, zeros):
            raise StructureError(f"{other.name} does more with its maps than to read them")
    return tuple(dict.fromkeys(readers)), tuple(depthwise)


def _ends_in_products(traced: fx.GraphModule, node: fx.Node, zeros: Collection[fx.Node]) -> bool:
    """Tell whether all that is made of a node is multiplied by maps that are off: `x * torch.sigmoid(x)`."""
    made, anew = {node}, set[fx.Node]()  # what shares no memory with the maps may be changed in place
    for user in traced.graph.nodes:
        is_product = user in zeros and name_operation(traced, user) in PRODUCTS
        if user is not node and (is_product or made.isdisjoint(user.all_input_nodes)):
            continue
        first = user.all_input_nodes[0]
        if user.op == "output" or (works_in_place(traced, user) and first not in anew):
            return False
        made.add(user)
        if first in anew or name_operation(traced, user) in MAKES_ANEW:
            anew.add(user)
    return True


def _is_depthwise(layer: nn.Module | None) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1


def _require_one_call(traced: fx.GraphModule, path: str) -> str:
    """Raise StructureError where a layer is not called once in each mode, with the same norm behind it."""
    norms = set[fx.node.Target]()
    for graph in list_graphs(traced):
        calls = graph.find_nodes(op="call_module", target=path)
        if len(calls) != 1:
            mode = "" if graph is traced.graph else " in training"
            raise StructureError(f"{path} is used {len(calls)} times{mode}")
        norms.update(find_norm(traced, call).target for call in calls)
    if len(norms) > 1:
        raise StructureError(f"{path} has a norm right behind it in one mode alone")
    return path


def iterate_layers(site: Site) -> Iterator[str]:
    """Iterate over all layers whose work depends on which of a site's kernels are on."""
    yield from (site.writer, *site.readers, *site.depthwise)
