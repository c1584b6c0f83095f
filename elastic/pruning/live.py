"""Count what gates leave of a network, without compacting it: for every few steps of a run.

All that is needed is read from the device at once; the channels are then followed on the CPU.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from elastic.measure.counts import count_nonzero, locate_parameters
from elastic.pruning.folding import compute_mask
from elastic.pruning.gates import find_grain
from elastic.widths.parameters import get_original, get_weight, get_weight_name, list_parametrizations
from elastic.widths.width import Width, Widths

Key = tuple[str, str]  # (layer, tensor)
BIAS = "bias"


class Entries(NamedTuple):
    """Count the entries of a tensor by its channels: those of one kernel, for a convolution's weight.

    Attributes:
        dims: the tensor's dimensions with channels, one an axis of the arrays.
        open: entries behind open gates.
        nonzero: entries that are open and not zero.
        size: all entries of the tensor.
    """

    dims: tuple[int, ...]
    open: NDArray[np.int32]
    nonzero: NDArray[np.int32]
    size: int


def count_live_params(model: nn.Module, widths: Widths) -> int:
    """Count `params` without what belongs to channels that gates have shut off."""
    entries, others = read_entries(model, widths)
    alive = find_alive(entries, widths).entries
    once = {id(_get_stored(model.get_submodule(key[0]), key[1])): key for key in entries}  # layers may share
    return others + sum(int(entries[key].nonzero[alive[key]].sum()) for key in once.values())


def count_live_macs(model: nn.Module, widths: Widths, uses: Mapping[str, float]) -> float:
    """Count the MACs of what is alive, by the `uses` of `count_macs_per_weight`.

    At channel grain they are those that dense kernels execute for the channels alive; at finer grains those
    of the weights alive, of which dense kernels do more. Layers of fixed channels alone stay as they are.
    """
    entries, _ = read_entries(model, widths)
    alive, channels = find_alive(entries, widths)
    weights = [key for key in entries if key[1] != BIAS]
    if find_grain(model) == "channel":
        masks = find_live_lines(entries, widths, channels)
        sizes = {key[0]: _count_dense(entries[key], masks, key) for key in weights}
    else:
        sizes = {key[0]: int(entries[key].open[alive[key]].sum()) for key in weights}
    return sum(
        use * (sizes[path] if path in sizes else get_weight(model.get_submodule(path)).numel())
        for path, use in uses.items()
    )


def _count_dense(entries: Entries, masks: Mapping[tuple[Key, int], NDArray[np.bool_]], key: Key) -> int:
    """Count the entries of a tensor without the lines of dead channels."""
    lines = math.prod(int(masks[key, dim].sum()) for dim in entries.dims)
    return lines * entries.size // entries.open.size


class Alive(NamedTuple):
    """Say what gates leave alive: of each tensor by its channels, and of each width."""

    entries: dict[Key, NDArray[np.bool_]]
    channels: dict[str, NDArray[np.bool_]]


def find_alive(entries: Mapping[Key, Entries], widths: Widths) -> Alive:
    """Find what gates leave alive.

    An entry lives if its own gate is open and its channels are written and read by open gates. A channel that
    dies may leave another one unread or unwritten, so widths are looked at again until none loses any more:
    upwards first, since what nothing reads needs no reader in turn, then downwards. Channels over which
    statistics are taken together live on, as they do in the compacted network. Constants do not count as
    written: compaction gives nearly all of them to what reads them.
    """
    alive = {key: entry.open > 0 for key, entry in entries.items()}
    channels = {name: np.ones(width.size, dtype=bool) for name, width in widths.items()}
    separate = [width for width in widths.values() if width.mixed is None]
    before = -1
    while (count := sum(int(lives.sum()) for lives in channels.values())) != before:
        before = count
        for width in (*reversed(separate), *separate):
            channels[width.name] = _drop_dead_channels(width, widths, entries, alive)
    return Alive(alive, channels)


def _drop_dead_channels(
    width: Width, widths: Widths, entries: Mapping[Key, Entries], alive: dict[Key, NDArray[np.bool_]]
) -> NDArray[np.bool_]:
    """Mark what lies on a width's dead channels as dead; tell which channels live."""
    lines = []  # of each slot: the tensor's entries, a channel (and copy) first
    for slot in width.slots:
        key = slot.module, slot.tensor
        if key in entries:
            axis = entries[key].dims.index(slot.dim)
            lines.append((slot, np.moveaxis(alive[key], axis, 0), widths.locate(slot, width.name)))
    is_read, is_written = np.zeros((2, width.size), dtype=bool)
    for slot, line, positions in lines:
        if slot.role in ("in", "out"):
            lives_here = is_read if slot.role == "in" else is_written
            lives_here |= np.any(line.reshape(len(line), -1), axis=1)[positions].any(1)
    lives = is_read & is_written
    for _, line, positions in lines:
        line[positions[~lives]] = False  # a view: the tensor's entries themselves
    return lives


def find_live_lines(
    entries: Mapping[Key, Entries], widths: Widths, channels: Mapping[str, NDArray[np.bool_]]
) -> dict[tuple[Key, int], NDArray[np.bool_]]:
    """Find, for each dimension of a tensor with channels, which lines are of channels alive."""
    masks = {
        (key, dim): np.ones(entry.open.shape[axis], dtype=bool)
        for key, entry in entries.items()
        for axis, dim in enumerate(entry.dims)
    }
    for width in widths.values():
        for slot in width.slots:
            mask = masks.get(((slot.module, slot.tensor), slot.dim))
            if mask is not None:
                mask[widths.locate(slot, width.name)[~channels[width.name]]] = False
    return masks


@torch.no_grad()
def read_entries(model: nn.Module, widths: Widths) -> tuple[dict[Key, Entries], int]:
    """Read the entries of all tensors on which channels lie, and the count of the other `params`."""
    dims: dict[Key, set[int]] = {}
    for slot in (slot for width in widths.values() for slot in width.slots):
        if slot.tensor in (get_weight_name(model.get_submodule(slot.module)), BIAS):
            dims.setdefault((slot.module, slot.tensor), set()).add(slot.dim)
    layers = {(path, tensor): model.get_submodule(path) for path, tensor in dims}
    stored = {key: _get_stored(layer, key[1]) for key, layer in layers.items()}
    by_channels = {id(tensor) for tensor in stored.values()}
    others = [getattr(*place) for key, place in locate_parameters(model).items() if key not in by_channels]
    counts = {key: _count_entries(layer, key[1], dims[key]) for key, layer in layers.items()}
    arrays = iter(
        _read([count_nonzero(others).int(), *(count for pair in counts.values() for count in pair)])
    )
    others_count = int(next(arrays))
    entries = {}
    for key, pair in counts.items():
        nonzero = next(arrays)
        size = stored[key].numel()
        is_open = next(arrays) if len(pair) > 1 else np.full_like(nonzero, size // nonzero.size)
        entries[key] = Entries(tuple(sorted(dims[key])), is_open, nonzero, size)
    return entries, others_count


def _count_entries(layer: nn.Module, tensor: str, dims: set[int]) -> list[Tensor]:
    """Count the entries that are not zero, and, where there are gates, those that are open, by channels.

    As few operators are called as can be, since this is done every few steps.
    """
    counts = [getattr(layer, tensor) != 0]
    if any(list_parametrizations(layer, tensor)):
        counts.append(compute_mask(layer, tensor) != 0)
    others = [dim for dim in range(counts[0].dim()) if dim not in dims]
    return [count.sum(others, dtype=torch.int32) if others else count for count in counts]


def _get_stored(layer: nn.Module, tensor: str) -> Tensor:
    stored = get_original(layer, tensor)
    assert stored is not None, f"a slot stands for {tensor}"
    return stored


def _read(counts: list[Tensor]) -> list[NDArray[np.int32]]:
    """Read all counts in one transfer from their device."""
    flat = torch.cat([count.flatten() for count in counts]).cpu().numpy()
    ends = np.cumsum([count.numel() for count in counts])
    return [part.reshape(c.shape) for part, c in zip(np.split(flat, ends[:-1]), counts, strict=True)]
