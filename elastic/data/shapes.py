"""Draw images: small, coloured, and nothing to download; with targets of several kinds."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from elastic.data.images import ImageData
from elastic.data.imageset import ImageSet, InMemory
from elastic.errors import DataError

TRAIN, TEST, SIDE = 1200, 300, 16


Targets = Literal["shape", "labels", "mask", "place"]
KINDS = 4  # disk, square, triangle, cross


class Shapes(ImageData):
    """Provide disks, squares, triangles and crosses, 16×16 in colour: 1,200 to train, 300 for the test.

    Place, size and the two colours of each are drawn at random, the same for every run, with noise on top.
    For trying things out: what works here may fail anywhere else.

    Args:
        targets: what is told of an image: its `shape` (a class of four); `labels`, for each of four whether
            it is so (large; high up; far left; bounded by straight lines); the `mask`, a class for each
            pixel (paper or ink); the `place` (height and side of the centre, and radius, each about -1 … 1).
        common: see `ImageData`.

    Raises:
        DataError: there are no such targets.
    """

    shape = (3, SIDE, SIDE)

    def __init__(self, targets: Targets = "shape", **common: Any) -> None:
        super().__init__(**common)
        if targets not in get_args(Targets):
            raise DataError(f"shapes have no '{targets}': set data.targets to {', '.join(get_args(Targets))}")
        self.targets = targets
        self.classes = {"shape": KINDS, "labels": 4, "mask": 2, "place": 3}[targets]

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """Draw them."""
        x_NCHW, targets = draw(TRAIN + TEST, torch.Generator().manual_seed(0))
        y_N = targets[self.targets]
        return InMemory(x_NCHW[:TRAIN], y_N[:TRAIN]), InMemory(x_NCHW[TRAIN:], y_N[TRAIN:])


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw x_NCHW in bytes, and their targets by name."""

    def draw_uniform(lower: float, upper: float, *shape: int) -> Tensor:
        return lower + (upper - lower) * torch.rand(count, *shape, generator=generator)

    y_N = torch.arange(count) % KINDS
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
    middle, half = (SIDE - 1) / 2, (SIDE - 13) / 2
    down_N, right_N = (centre[:, i, 0, 0] for i in (0, 1))
    size_N = (radius[:, 0, 0] - 4.5) / 1.5
    targets = {
        "shape": y_N,
        "labels": torch.stack([size_N > 0, down_N < middle, right_N < middle, y_N != 0], 1).long(),
        "mask": shape_N1HW[:, 0].long(),
        "place": torch.stack([(down_N - middle) / half, (right_N - middle) / half, size_N], 1),
    }
    x_NCHW = x_NCHW.round().clamp(0, 255).to(torch.uint8)[order]
    return x_NCHW, {name: target[order] for name, target in targets.items()}
