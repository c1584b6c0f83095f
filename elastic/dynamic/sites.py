"""Find the kernels that can be switched off: those whose maps need not be read where they are zero."""

from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import lcm

from torch import fx, nn

from elastic.dynamic.calls import find_calls, find_norm, is_convolution, require_one_call
from elastic.dynamic.following import follow_maps
from elastic.dynamic.pointwise import list_pointwise
from elastic.dynamic.products import ends_in_products
from elastic.dynamic.sums import find_addend
from elastic.errors import StructureError
from elastic.widths.operations.interface import Role
from elastic.widths.tracing import describe_node, get_layer
from elastic.widths.width import Slot, Width, Widths


@dataclass(frozen=True)
class Reader:
    """Name a layer that reads maps, and where they lie, begin to end, among the channels that it reads."""

    path: str
    begin: int
    end: int
    channels: int

    @property
    def share(self) -> float:
        """Give the part of what it reads that they are."""
        return (self.end - self.begin) / self.channels


@dataclass(frozen=True)
class Site:
    """Name the layers that kernels are in: who computes them, who reads or follows their maps.

    Maps that end a branch have no readers: where they are off, they are left out of a sum.

    Attributes:
        followers: layers that treat each map, or group of maps, by itself, behind which those that are off
            are made zero again.
        width: its name; None for maps that end a branch.
        axis: where the channels of its maps lie: 1, or -1 behind a linear layer.
        together: how many kernels, one after the other, are switched as one.
    """

    writer: str
    readers: tuple[Reader, ...]
    followers: tuple[str, ...]
    width: str | None = None
    axis: int = 1
    together: int = 1


def find_sites(
    traced: fx.GraphModule, widths: Widths, names: Iterable[str] | None = None, branches: bool = False
) -> list[Site]:
    """Find the sites of the widths that are named, or of all that have one.

    Args:
        branches: whether to find those that end a branch, too.

    Raises:
        StructureError: a width that is named has none, or there is no site.
    """
    ends = find_branch_sites(traced, widths.untrained) if branches else []
    pointwise = list_pointwise(traced, widths)
    if names is not None:
        names = [names] if isinstance(names, str) else dict.fromkeys(names)
        named = [find_site(traced, widths, widths[name], pointwise) for name in names]
        if not named and not ends:
            raise StructureError("no width is named whose kernels could be switched off: name one")
        return named + ends
    sites, refusals = [], []
    for width in widths.values():
        try:
            sites.append(find_site(traced, widths, width, pointwise))
        except StructureError as refusal:
            refusals.append(refusal)
    if refusals and not sites and not ends:
        raise refusals[0]
    return sites + ends


def find_site(traced: fx.GraphModule, widths: Widths, width: Width, pointwise: Collection[str]) -> Site:
    """Find where a width's kernels are.

    Of several layers that write a width one may be switched if its maps are multiplied by the others', not
    added, and are zeros until then (those that squeeze and excitation weighs, not those that weigh them):
    where they are off, so are the products.

    Args:
        pointwise: the linear layers that are applied to each position, see `list_pointwise`.

    Raises:
        StructureError: they cannot be switched off; it says why.
    """
    writers = sorted({slot.module for slot in width.slots_with("out")})
    reason = width.mixed or "no layer writes them"
    for writer in writers if width.mixed is None else ():
        try:
            call = _find_call(traced, width, writer, pointwise)
            return _find_site(traced, widths, width, call, len(writers) == 1)
        except StructureError as error:
            reason = str(error)
    if len(writers) > 1 and width.mixed is None:
        reason = f"several layers write its maps, {' and '.join(writers[:2])}"
    raise StructureError(f"the kernels of '{width.name}' cannot be switched off: {reason}")


def _find_site(traced: fx.GraphModule, widths: Widths, width: Width, call: fx.Node, is_alone: bool) -> Site:
    """Find the site of the kernels of one layer, which is called once, alone or among others."""
    writer, axis = str(call.target), 1 if is_convolution(get_layer(traced, call)) else -1
    if writer in widths.untrained:
        raise StructureError(f"the forward keeps gradients from {writer}")
    followed = follow_maps(traced, call, axis)
    slots = {slot.module for slot in width.slots}
    if not is_alone and len(followed.maps) > len(followed.list_zeros()):
        raise StructureError("others' maps are multiplied with what is made of its maps")
    for other in followed.others:
        if not ends_in_products(traced, other, followed.list_zeros()):
            raise StructureError(f"{describe_node(other)} does more with its maps than to read them")
    if others := [path for path in followed.followers if path not in slots]:
        raise StructureError(f"{others[0]} does not treat each of its maps by itself")
    paths = dict.fromkeys(followed.readers)
    readers = tuple(_locate_maps(traced, widths, width, writer, path) for path in paths)
    for path in () if is_alone else paths:  # in another call it may read another layer's maps
        require_one_call(traced, path)
    together = _count_together(traced, followed.followers)
    return Site(writer, readers, tuple(followed.followers), width.name, axis, together)


def _count_together(traced: fx.GraphModule, followers: Iterable[str]) -> int:
    """Count the kernels that are switched as one, since a group norm takes statistics over their maps."""
    layers = map(traced.get_submodule, followers)
    return lcm(*(norm.num_channels // norm.num_groups for norm in layers if isinstance(norm, nn.GroupNorm)))


def _locate_maps(traced: fx.GraphModule, widths: Widths, width: Width, writer: str, path: str) -> Reader:
    """Locate the maps that one layer writes among those that another reads, by the order of their widths."""
    (out, *_), slots = _find_slots(width, "out", writer), _find_slots(width, "in", path)
    if not slots:
        raise StructureError(f"{path} does not read them as its channels")
    groups = count_reading_groups(traced.get_submodule(path))
    written = [segment.width for segment in out.layout]
    read = [segment.width for segment in slots[0].layout] * groups
    places = [i for i in range(len(read)) if read[i : i + len(written)] == written]
    if len(places) != 1 or (groups > 1 and read != written):
        raise StructureError(f"{path} does not read them once, one after the other")
    extents = widths.extents(slots[0]) * groups
    begin, end = sum(extents[: places[0]]), sum(extents[: places[0] + len(written)])
    if (end - begin) % sum(widths.extents(out)):
        raise StructureError(f"{path} reads several of its kernels as one map")
    return Reader(path, begin, end, sum(extents))


def count_reading_groups(layer: nn.Module) -> int:
    """Count the groups of channels that lie one after the other on the same dimension of a layer's weight."""
    groups: int = 1 if getattr(layer, "transposed", False) else getattr(layer, "groups", 1)
    return groups


def _find_slots(width: Width, role: Role, path: str) -> list[Slot]:
    return [slot for slot in width.slots_with(role) if slot.module == path]


def find_branch_sites(traced: fx.GraphModule, untrained: Collection[str]) -> list[Site]:
    """Find the convolutions that end a branch: their maps, behind their norm, are added to others.

    A projection in the other branch, which reads what the block reads, is none of them, and nor is one that
    no gradient comes to.
    """
    sites = []
    for call in traced.graph.nodes:
        layer = get_layer(traced, call)
        is_trained = str(call.target) not in untrained
        if not is_convolution(layer) or layer.groups > 1 or not call.args or not is_trained:
            continue
        end, source = find_norm(traced, call), call.args[0]
        is_added = len(end.users) == 1 and find_addend(next(iter(end.users)), end) is not None
        reads_alone = isinstance(source, fx.Node) and len(source.users) == 1
        is_called_once = len(find_calls(traced, str(end.target))) == 1
        if is_added and reads_alone and is_called_once:
            with suppress(StructureError):  # it is called more often, or otherwise in training
                sites.append(Site(require_one_call(traced, str(call.target)), (), ()))
    return sites


def _find_call(traced: fx.GraphModule, width: Width, writer: str, pointwise: Collection[str]) -> fx.Node:
    """Find the one call of a layer that writes a width, and nothing but the width."""
    (call,) = find_calls(traced, require_one_call(traced, writer))
    layer = get_layer(traced, call)
    if not is_convolution(layer) and writer not in pointwise:
        is_other = not isinstance(layer, nn.Linear)
        reason = "is no ordinary convolution" if is_other else "reads no samples of several positions"
        raise StructureError(f"{writer} ({type(layer).__name__}) {reason}")
    if not call.args:
        raise StructureError(f"{writer} is given what it reads by name")
    if any(segment.width != width.name for segment in _find_slots(width, "out", writer)[0].layout):
        raise StructureError(f"it is a part of the channels of {writer}")
    return call
