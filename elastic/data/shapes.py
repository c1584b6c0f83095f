"""Draw images: small, coloured, and nothing to download."""

import torch
from torch import Tensor

from elastic.data.images import ImageData
from elastic.data.imageset import ImageSet, InMemory

TRAIN, TEST, SIDE = 1200, 300, 16


class Shapes(ImageData):
    """Provide disks, squares, triangles and crosses, 16×16 in colour: 1,200 to train, 300 for the test.

    Place, size and the two colours of each are drawn at random, the same for every run, with noise on top.
    For trying things out: what works here may fail anywhere else.
    """

    shape = (3, SIDE, SIDE)
    classes = 4

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """Draw them."""
        x_NCHW, y_N = draw(TRAIN + TEST, torch.Generator().manual_seed(0))
        return InMemory(x_NCHW[:TRAIN], y_N[:TRAIN]), InMemory(x_NCHW[TRAIN:], y_N[TRAIN:])


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw x_NCHW in bytes, and y_N: disk, square, triangle, cross."""

    def draw_uniform(lower: float, upper: float, *shape: int) -> Tensor:
        return lower + (upper - lower) * torch.rand(count, *shape, generator=generator)

    y_N = torch.arange(count) % Shapes.classes
    radius = draw_uniform(3, 6, 1, 1)
    centre = draw_uniform(6, SIDE - 7, 2, 1, 1)
    grid = torch.arange(SIDE, dtype=torch.float32)
    down, right = ((grid.view(shape) - centre[:, i]) / radius for i, shape in enumerate(((-1, 1), (1, -1))))
    inside = (down.abs() <= 1) & (right.abs() <= 1)
    masks = (
        down.square() + right.square() <= 1,
        inside,
        inside & (right.abs() <= (1 + down) / 2),
        inside & ((down.abs() < 0.35) | (right.abs() < 0.35)),
    )
    shape_N1HW = torch.stack(masks)[y_N, torch.arange(count)][:, None].float()
    paper, ink = draw_uniform(0, 110, 3, 1, 1), draw_uniform(145, 255, 3, 1, 1)
    x_NCHW = paper + shape_N1HW * (ink - paper) + 12 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    order = torch.randperm(count, generator=generator)
    return x_NCHW.round().clamp(0, 255).to(torch.uint8)[order], y_N[order]
