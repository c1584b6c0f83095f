"""Count what gates leave of a network, without compacting it: for every few steps of a run.

All that is needed is read from the device at once; the channels are then followed on the CPU.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from elastic.measure.counts import count_nonzero
from elastic.pruning.folding import compute_mask
from elastic.widths.discovery import Slot, Width, Widths

Key = tuple[str, str]  # (layer, tensor)


class Entries(NamedTuple):
    """Count the entries of a tensor by its channels: those of one kernel, for a convolution's weight.

    Attributes:
        dims: the tensor's dimensions with channels, one an axis of the arrays.
        open: entries behind open gates.
        nonzero: entries that are open and not zero.
    """

    dims: tuple[int, ...]
    open: NDArray[np.int32]
    nonzero: NDArray[np.int32]


def count_live_params(model: nn.Module, widths: Widths) -> int:
    """Count `params` without what belongs to channels that gates have shut off."""
    params, entries = read_entries(model, widths)
    alive = find_live_entries(entries, widths)
    return params - sum(int(entry.nonzero[~alive[key]].sum()) for key, entry in entries.items())


def count_live_macs(model: nn.Module, widths: Widths, uses: Mapping[str, float]) -> float:
    """Count the MACs of the weights alive, by the `uses` of `count_macs_per_weight`.

    At channel grain they are the compacted network's; at finer grains dense kernels do more.
    """
    _, entries = read_entries(model, widths)
    alive = find_live_entries(entries, widths)
    weights = {path: (path, "weight") for path in uses}
    return sum(uses[path] * int(entries[key].open[alive[key]].sum()) for path, key in weights.items())


def find_live_entries(entries: Mapping[Key, Entries], widths: Widths) -> dict[Key, NDArray[np.bool_]]:
    """Find what gates leave alive of each tensor, by its channels.

    An entry lives if its own gate is open and its channels are written and read by open gates. A channel that
    dies may leave another one unread or unwritten, so widths are looked at again until none loses any more:
    upwards first, since what nothing reads needs no reader in turn, then downwards.
    """
    alive = {key: entry.open > 0 for key, entry in entries.items()}
    sizes = dict.fromkeys(widths, -1)
    order = [*reversed(list(widths.values())), *widths.values()]
    while True:
        before = dict(sizes)
        for width in order:
            sizes[width.name] = _drop_dead_channels(width, widths, entries, alive)
        if sizes == before:
            return alive


def _drop_dead_channels(
    width: Width, widths: Widths, entries: Mapping[Key, Entries], alive: dict[Key, NDArray[np.bool_]]
) -> int:
    """Mark what lies on a width's dead channels as dead; count the channels that live."""
    lines = []  # of each slot: the tensor's entries, a channel (and copy) first
    for slot in width.slots:
        key = slot.module, slot.tensor
        if key in entries:
            axis = entries[key].dims.index(slot.dim)
            lines.append((slot, np.moveaxis(alive[key], axis, 0), _locate(slot, width.name, widths)))
    is_read, is_written = np.zeros((2, width.size), dtype=bool)
    for slot, line, positions in lines:
        if slot.role in ("in", "out") or slot.tensor == "bias":  # a constant is written, too
            side = is_read if slot.role == "in" else is_written
            side |= np.any(line.reshape(len(line), -1), axis=1)[positions].any(1)
    lives = is_read & is_written
    for _, line, positions in lines:
        line[positions[~lives]] = False  # a view: the tensor's entries themselves
    return int(lives.sum())


def _locate(slot: Slot, name: str, widths: Widths) -> NDArray[np.int64]:
    """Find where a width's channels lie on a slot, as `Widths.positions` does: (channels, copies)."""
    parts, start = [], 0
    for segment, extent in zip(slot.layout, widths.extents(slot), strict=True):
        if segment.width == name:
            parts.append(np.arange(start, start + extent).reshape(-1, segment.repeat))
        start += extent
    return np.concatenate(parts, axis=1)


@torch.no_grad()
def read_entries(model: nn.Module, widths: Widths) -> tuple[int, dict[Key, Entries]]:
    """Read, in one transfer, the network's `params` and the entries of all tensors on which channels lie."""
    dims: dict[Key, set[int]] = {}
    for slot in (slot for width in widths.values() for slot in width.slots):
        if slot.tensor in ("weight", "bias"):
            dims.setdefault((slot.module, slot.tensor), set()).add(slot.dim)
    counts = {key: _count(model.get_submodule(key[0]), key[1], dims[key]) for key in dims}
    flat = [count.flatten() for count in counts.values()]
    params, *read = torch.cat([count_nonzero(model)[None].int(), *flat]).cpu().split([1, *map(len, flat)])
    arrays = [part.numpy().reshape(count.shape) for part, count in zip(read, counts.values(), strict=True)]
    return int(params), {
        key: Entries(tuple(sorted(dims[key])), *array) for key, array in zip(dims, arrays, strict=True)
    }


def _count(layer: nn.Module, tensor: str, dims: set[int]) -> Tensor:
    """Count the entries that are open, and those that are not zero, over all dimensions but these."""
    values: Tensor = getattr(layer, tensor)
    both = torch.stack([compute_mask(layer, tensor) != 0, values != 0])
    others = [1 + dim for dim in range(values.dim()) if dim not in dims]
    return both.sum(others, dtype=torch.int32) if others else both.int()
