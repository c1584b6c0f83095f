"""Make indices: for each new channel, the old one that it continues."""

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic.errors import StructureError

FRESH = -1  # in place of an old channel
Index = Sequence[int] | Tensor


def grow_index(size: int, by: int) -> Tensor:
    """Keep all channels and add `by` fresh ones."""
    return torch.cat([torch.arange(size), torch.full((by,), FRESH)])


def split_index(size: int, by: int, generator: torch.Generator) -> Tensor:
    """Keep all channels and let `by` of them, drawn at random, stand twice (or more where by > size)."""
    orders = [torch.randperm(size, generator=generator) for _ in range(-(-by // size))]
    return torch.cat([torch.arange(size), torch.cat(orders)[:by]])


def pair_index(size: int, by: int) -> Tensor:
    """Complete a growth by `by` channels of which the first half are there: let each of them stand twice.

    Of an odd number one stays alone.
    """
    return torch.cat([torch.arange(size + by - by // 2), size + torch.arange(by // 2)])


def resize_index(size: int, to: int) -> Tensor:
    """Keep the first `to` channels, with fresh ones past the last: gives shapes to be loaded into."""
    return torch.arange(to).where(torch.arange(to) < size, torch.tensor(FRESH))


def check_index(index: Index, size: int, name: str) -> Tensor:
    """Turn the index of a width into a tensor.

    Raises:
        StructureError: it is no list of channel numbers, it is empty, or out of range.
    """
    channels = torch.as_tensor(index).cpu()
    if channels.numel() and (channels.is_floating_point() or channels.dtype == torch.bool):
        raise StructureError(f"width '{name}' is indexed by channel numbers, not by {channels.dtype} values")
    if channels.dim() != 1 or len(channels) == 0:
        raise StructureError(f"width '{name}' needs at least one channel; the index given leaves none")
    channels = channels.long()
    if channels.min() < FRESH or channels.max() >= size:
        limits = f"{int(channels.min())} … {int(channels.max())}"
        raise StructureError(f"width '{name}' has channels 0 … {size - 1}; the index asks for {limits}")
    return channels
