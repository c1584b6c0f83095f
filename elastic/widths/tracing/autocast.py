"""Follow where a forward sets the precision itself: `torch.autocast` within it, which torch.fx leaves out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from elastic.widths.hooks import LOOKS

REGIONS = "autocast"  # in a node's `meta`: the regions that it is in, from the outermost


class Region(NamedTuple):
    """Say what a region of `torch.autocast` sets.

    Attributes:
        dtype: None where the program gives none: it is what is set around the region then.
    """

    device: str
    dtype: torch.dtype | None
    enabled: bool


State = tuple[str, bool, torch.dtype]  # a device, whether autocast is enabled there, and by which type


@contextmanager
def note_regions(regions: list[Region]) -> Iterator[None]:
    """Keep a list of the regions that a forward is in while it is traced, from the outermost."""
    methods = {name: vars(torch.autocast)[name] for name in ("__init__", "__enter__", "__exit__")}
    without_dtype: dict[int, torch.autocast] = {}  # held, so that no other gets the identity of one

    def initialize(
        region: torch.autocast, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        methods["__init__"](region, device_type, dtype, *args, **kwargs)
        if dtype is None:
            without_dtype[id(region)] = region

    def enter(region: torch.autocast) -> Any:
        dtype = None if id(region) in without_dtype else region.fast_dtype
        regions.append(Region(region.device, dtype, region._enabled))
        return methods["__enter__"](region)

    def leave(region: torch.autocast, *error: Any) -> Any:
        regions.pop()
        return methods["__exit__"](region, *error)

    try:
        for name, method in zip(methods, (initialize, enter, leave), strict=True):
            setattr(torch.autocast, name, method)
        yield
    finally:
        for name, method in methods.items():
            setattr(torch.autocast, name, method)


def keep_regions(graph: fx.Graph, device: str, gives_tensor: Callable[[fx.Node], bool]) -> None:
    """Let a graph begin and end the regions that its nodes know of.

    Args:
        device: where the network was traced: the regions for it are for wherever its inputs are later.
        gives_tensor: tells whether a node gives a tensor.
    """
    x = next(filter(gives_tensor, graph.find_nodes(op="placeholder")), None)
    begun: list[tuple[Region, fx.Node]] = []
    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr"):
            continue
        regions = node.meta.get(REGIONS, ())
        while tuple(region for region, _ in begun) != regions[: len(begun)]:
            with graph.inserting_before(node):
                graph.call_function(end_region, (begun.pop()[1],))
        for region in regions[len(begun) :]:
            follows = x if region.device == device else None
            with graph.inserting_before(node):
                begun.append((region, graph.call_function(begin_region, (follows, *region))))


def begin_region(x: Tensor | None, device: str, dtype: torch.dtype | None, enabled: bool) -> State:
    """Set the precision of what follows, and return the one before.

    An error may leave a region without its end: `torch.autocast` itself would then count one too many for
    good, and never again forget the weights that it has cast.

    Args:
        x: a tensor whose device is meant, if it is given and has data.
        dtype: as it is set already where it is None.
    """
    device = device if x is None or x.is_meta else x.device.type
    state = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    _set(device, enabled, dtype or state[2])
    return state


def end_region(state: State) -> None:
    """Bring the precision back to what it was before a region."""
    device, is_enabled, _ = state
    if torch.is_autocast_enabled(device) and not is_enabled:
        torch.clear_autocast_cache()  # of weights that steps change
    _set(*state)


def _set(device: str, enabled: bool, dtype: torch.dtype) -> None:
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype)


for _function in (begin_region, end_region):
    setattr(_function, LOOKS, True)
    fx.node.has_side_effect(_function)
