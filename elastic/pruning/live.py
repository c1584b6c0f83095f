"""What gates leave of a network, counted without compacting it: for every few steps of a run."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from elastic.measure.counts import count_params
from elastic.pruning.gates import compute_mask
from elastic.widths.discovery import Widths


@torch.no_grad()
def find_live_entries(model: nn.Module, widths: Widths) -> dict[tuple[str, str], Tensor]:
    """What gates leave alive of each tensor, by (layer, tensor): 1 or 0 an entry.

    An entry lives if its own gate is open and its channels are written and read by open gates.
    """
    slots = [slot for width in widths.values() for slot in width.slots if slot.tensor in ("weight", "bias")]
    masks = {(s.module, s.tensor): compute_mask(model.get_submodule(s.module), s.tensor).cpu() for s in slots}
    before, now = -1.0, 0.0
    while now != before:  # a channel that dies may leave another one unread
        for name, width in widths.items():
            alive = torch.ones(width.size, dtype=torch.bool)
            biases = [slot for slot in width.slots if slot.tensor == "bias"]  # a constant is written, too
            for slots_ in (width.slots_with("out") + biases, width.slots_with("in")):
                open_ = torch.zeros(width.size, dtype=torch.bool)
                for slot in slots_:
                    lines = masks[slot.module, slot.tensor].transpose(0, slot.dim)
                    open_ |= lines.reshape(len(lines), -1).any(1)[widths.positions(slot, name)].any(1)
                alive &= open_
            for slot in width.slots:
                if (slot.module, slot.tensor) in masks:
                    dead = widths.positions(slot, name)[~alive].flatten()
                    masks[slot.module, slot.tensor].index_fill_(slot.dim, dead, 0)
        before, now = now, sum(float(mask.sum()) for mask in masks.values())
    return masks


@torch.no_grad()
def count_live_params(model: nn.Module, widths: Widths) -> int:
    """`params`, without what belongs to channels that gates have shut off."""
    masks = find_live_entries(model, widths)
    dead = sum(
        int((getattr(model.get_submodule(path), tensor).cpu() != 0).logical_and(mask == 0).sum())
        for (path, tensor), mask in masks.items()
    )
    return count_params(model) - dead


def count_live_macs(model: nn.Module, widths: Widths, uses: Mapping[str, float]) -> float:
    """MACs of the weights alive, by the `uses` of `macs_per_weight`.

    At channel grain they are the compacted network's; at finer grains dense kernels do more.
    """
    masks = find_live_entries(model, widths)
    return sum(times * float(masks[path, "weight"].sum()) for path, times in uses.items())
