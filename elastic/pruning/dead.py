"""Find channels that do nothing: those that nothing reads, and those that nothing writes."""

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor, nn

from elastic.pruning.constants import observe_constants, observe_in_training, read_constants
from elastic.pruning.folding import compute_mask
from elastic.widths.inputs import Example
from elastic.widths.mode import preserve_modes, set_mode
from elastic.widths.width import Slot, Width, Widths

# From a layer and the name of its tensor to values that are 0 where nothing is written or read.
Lookup = Callable[[str, str], Tensor]


@torch.no_grad()
def find_removable_channels(model: nn.Module, widths: Widths, example: Example) -> dict[str, Tensor]:
    """Find the channels to keep of each width that has some that gates have shut off.

    Shut off: all gates of what reads them are closed; or all of what writes them, and they are exactly zero
    wherever they are read. Dropping them leaves the function as it is, so it can be done in the middle of
    training. A fresh channel, whose weights are zero but whose gates are open, stays; so does the last one.
    """

    @cache
    def read_mask(path: str, tensor: str) -> Tensor:
        return compute_mask(model.get_submodule(path), tensor)

    # A norm that takes statistics over channels together feels the dead ones too.
    separate = {name: width for name, width in widths.items() if width.mixed is None}
    unread = {name: find_unread(widths, width, read_mask) for name, width in separate.items()}
    unwritten = {name: find_unwritten(widths, width, read_mask) for name, width in separate.items()}
    candidates = [separate[name] for name in separate if (unwritten[name] & ~unread[name]).any()]
    readers = {slot.module for width in candidates for slot in width.slots_with("in")}
    # Of the unwritten ones those stay that hold a constant other than zero: a norm's shift, a bias.
    modes = list(_observe_both_modes(model, readers, example)) if readers else []
    for constants in modes:
        # What reads them in one mode alone, such as an auxiliary head, does not mind the other.
        known = ChainMap(constants, *modes)
        for width in candidates:
            for _, values in read_constants(widths, width, known):
                unwritten[width.name] &= (values == 0).all(1)
    return list_kept({name: unread[name] | unwritten[name] for name in separate})


def list_kept(dead: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """List the channels to keep of each width that has dead ones; of a width that is all dead, the first."""
    keep = {}
    for name, mask in dead.items():
        alive = (~mask).nonzero().flatten() if not mask.all() else torch.zeros(1, dtype=torch.long)
        if len(alive) < len(mask):
            keep[name] = alive
    return keep


def _observe_both_modes(
    model: nn.Module, readers: Iterable[str], example: Example
) -> Iterator[dict[str, Tensor]]:
    """Yield the constants in evaluation mode, then those by the statistics of a batch."""
    with preserve_modes(model):
        yield observe_constants(set_mode(model), readers, example)
    yield observe_in_training(model, readers, example)


def find_unread(widths: Widths, width: Width, look_up: Lookup) -> Tensor:
    """Find the channels whose values are zero in all that reads them: (channels,)."""
    return _are_zero(widths, width, width.slots_with("in"), look_up)


def find_unwritten(widths: Widths, width: Width, look_up: Lookup) -> Tensor:
    """Find the channels whose values are zero in all that writes them: (channels,)."""
    return _are_zero(widths, width, width.slots_with("out"), look_up)


def _are_zero(widths: Widths, width: Width, slots: Iterable[Slot], look_up: Lookup) -> Tensor:
    """Tell which channels of a width have zeros alone in all of these slots: (channels,)."""
    are_zero = torch.ones(width.size, dtype=torch.bool)
    for slot in slots:
        values = look_up(slot.module, slot.tensor)
        positions = widths.positions(slot, width.name)  # (channels, copies)
        # Most lines show by their first entry that they are not zero; only the others are read.
        firsts = values[tuple(slice(None) if dim == slot.dim else 0 for dim in range(values.dim()))].cpu()
        are_zero &= (firsts[positions] == 0).all(1)
        positions = positions[are_zero]
        lines = values.index_select(slot.dim, positions.flatten().to(values.device))
        others = [dim for dim in range(values.dim()) if dim != slot.dim]
        are_zero[are_zero.clone()] = (lines.abs_().sum(others) == 0).cpu().view(positions.shape).all(1)
    return are_zero
