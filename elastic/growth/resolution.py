"""Decide how large training images are as a run goes on, and bring them to that size; no model is in sight.

Images that begin small make early steps cheap: progressive resizing, Howard, fast.ai (2018); Tan & Le,
arXiv 2104.00298, 4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from elastic.ranges import Count, Part, Range, checked


@checked
@dataclass(frozen=True)
class Resolution:
    """Say how large training images are: their sides grow along a line, to full size and no further.

    Args:
        start: sides at the start ÷ full sides.
        until: part of the run from which images have their full size.
        multiple: sides are rounded up to a multiple of that many pixels.
    """

    start: Annotated[float, Range(0, 1, above=True)] = 0.5
    until: Part = 0.7
    multiple: Count = 4

    def compute_sides(self, full: Sequence[int], progress: float) -> list[int]:
        """Give the sides of images of full sides `full` when a part of the run has passed."""
        part = 1.0 if progress >= self.until else self.start + (1 - self.start) * progress / self.until
        return [min(side, ceil(round(part * side, 6) / self.multiple) * self.multiple) for side in full]


def resize(x_BCHW: Tensor, sides: Sequence[int]) -> Tensor:
    """Bring images to other sides, with no aliases where they become smaller."""
    if list(x_BCHW.shape[2:]) == list(sides):
        return x_BCHW
    wide = torch.promote_types(x_BCHW.dtype, torch.float32)  # which CPUs have no 16-bit kernels for
    return F.interpolate(x_BCHW.to(wide), list(sides), mode="bilinear", antialias=True).to(x_BCHW.dtype)


def change_images(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, the first of them changed, and others that are images of its size."""
    values = [*args, *kwargs.values()]
    first = values[0]

    def is_image(x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.shape[2:] == first.shape[2:]

    changed = [change(x) if x is first or is_image(x) else x for x in values]
    return tuple(changed[: len(args)]), dict(zip(kwargs, changed[len(args) :], strict=True))
