"""Choose the algorithm that the kernel carries out a convolution by, and transform its weights for it.

3×3 ones may go tile by tile. This is Winograd's F(2×2, 3×3): Lavin & Gray, arXiv 1509.09308, section 4.1.
"""

import math

from torch import Tensor

PIXELS, TILES, STRIPS = range(3)  # as in the kernel
# Products that transforms of a tile, for one channel, take as long as, about: alone, and side by side.
ALONE, TOGETHER = 25, 8
VECTOR = 16  # pixels, or tiles
FEW = 4  # tiles


def choose_algorithm(channels: int, kernels: int, height: int, width: int, once: bool = False) -> int:
    """Choose where a map takes fewest vectors of products, transforms counted.

    Args:
        once: whether some weights, here and there, are read for one sample only: few tiles wait
            for them then, and transformed ones are more.
    """
    products, transforms = channels * kernels, channels + kernels
    tiles = math.ceil(height / 2) * math.ceil(width / 2)
    if once and tiles <= FEW:
        return PIXELS
    vectors = math.ceil(tiles / VECTOR)
    costs = {
        PIXELS: 9 * math.ceil(height * width / VECTOR) * products,
        TILES: tiles * (products + ALONE * transforms),
        STRIPS: vectors * VECTOR * (products + TOGETHER * transforms),
    }
    if vectors < 2:  # which share the load of a weight
        del costs[STRIPS]
    return min(costs, key=costs.__getitem__)


def transform_weight(weight_KC33: Tensor, algorithm: int) -> Tensor:
    """Compute G g Gᵀ of each kernel, 4×4; of strips one row after another."""
    if algorithm == PIXELS:
        return weight_KC33
    g_43 = weight_KC33.new_tensor([[2.0, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2
    weight_KC44 = g_43 @ weight_KC33 @ g_43.T
    return (weight_KC44.movedim(2, 0) if algorithm == STRIPS else weight_KC44).contiguous()
