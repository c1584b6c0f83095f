"""Average maps, and spread factors over them, wherever in a tensor their channels lie.

The axis of channels is 1, as convolutions have it, or -1, as linear layers have it that are applied to each
position.
"""

from torch import Tensor


def list_positions(x: Tensor, axis: int) -> list[int]:
    """List the dimensions that are neither samples nor channels."""
    return [dim for dim in range(1, x.dim()) if dim != axis % x.dim()]


def average_maps(x: Tensor, axis: int) -> Tensor:
    """Average each map over its positions: mean_BC."""
    return x.mean(list_positions(x, axis))


def spread_over_maps(factor_BK: Tensor, x: Tensor, axis: int) -> Tensor:
    """Give factors the dimensions of x, so that each sample's maps can be multiplied by them."""
    ones = [None] * (x.dim() - 2)
    return factor_BK[(slice(None), *ones)] if axis == -1 else factor_BK[(..., *ones)]
