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


def repeat_for_resized(factor_BK: Tensor, x: Tensor) -> Tensor:
    """Repeat factors for maps of other dimensions: if flattened, each is several channels in a row."""
    channels = x.shape[1] // factor_BK.shape[1]
    return factor_BK[..., None].expand(-1, -1, channels).flatten(1)


def gate_resized(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply by their gates maps that have other dimensions by now, such as flattened ones."""
    return x * spread_over_maps(repeat_for_resized(gate.flatten(1), x), x, 1)
