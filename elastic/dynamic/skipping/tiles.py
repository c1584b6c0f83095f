"""Decide where 3×3 convolutions go tile by tile, and transform their weights for it.

This is Winograd's F(2×2, 3×3): Lavin & Gray, arXiv 1509.09308, section 4.1.
"""

import math

import torch
from torch import Tensor

TRANSFORMS = 25  # products that a tile's transform for one channel takes as long as, about


def prefer_tiles(channels: int, kernels: int, height: int, width: int) -> bool:
    """Tell whether a map takes fewer vectors of products by tiles, transforms counted, than by pixels."""
    products, tiles = channels * kernels, math.ceil(height / 2) * math.ceil(width / 2)
    by_pixels = 9 * math.ceil(height * width / 16) * products
    return tiles * (products + TRANSFORMS * (channels + kernels)) < by_pixels


def transform_weight(weight_KC33: Tensor) -> Tensor:
    """Compute G g Gᵀ of each kernel."""
    g_43 = torch.tensor([[2.0, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2
    return (g_43 @ weight_KC33 @ g_43.T).contiguous()
