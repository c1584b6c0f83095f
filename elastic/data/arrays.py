"""Provide images that are in memory already, as arrays or tensors of a declared range."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastic.data.images import ImageData
from elastic.data.imageset import ImageSet, InMemory
from elastic.errors import DataError

Array = Tensor | np.ndarray[Any, Any]
MOST_CHANNELS = 16  # more are a sign of channels that stand elsewhere


class ArrayData(ImageData):
    """Provide images and labels that are in memory.

    Images are N, H, W in grey, otherwise tensors are N, C, H, W and NumPy's arrays N, H, W, C. They are kept
    as bytes: what has more than 256 values is rounded to as many.

    Args:
        train, test: images and labels 0, 1, 2, … of each part.
        range: what is black and what is white; bytes have 0 and 255 by default.
        class_names: in the order of the labels.
        common: see `ImageData`.
    """

    def __init__(
        self,
        train: tuple[Array, Array],
        test: tuple[Array, Array],
        range: tuple[float, float] | None = None,
        class_names: Sequence[str] = (),
        **common: Any,
    ) -> None:
        super().__init__(**common)
        labels = [torch.as_tensor(part[1]).long() for part in (train, test)]
        self.classes = max(int(label_N.max()) for label_N in labels) + 1
        if class_names and len(class_names) != self.classes:
            raise DataError(
                f"{len(class_names)} class_names for {self.classes} classes: give one for each label"
            )
        images = [_convert_bytes(part[0], range) for part in (train, test)]
        self._parts = [_join(*pair, class_names) for pair in zip(images, labels, strict=True)]
        first, second = (tuple(x_NCHW.shape[1:]) for x_NCHW in images)
        if first != second:
            raise DataError(f"training images are {first}, test images {second}: bring both to one shape")
        self.shape = (first[0], first[1], first[2])

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """Return what is in memory."""
        return self._parts[0], self._parts[1]


def _join(x_NCHW: Tensor, y_N: Tensor, class_names: Sequence[str]) -> InMemory:
    if len(x_NCHW) != len(y_N) or y_N.min() < 0:
        raise DataError(
            f"{len(x_NCHW)} images have {len(y_N)} labels from {y_N.min()}: give one each, from 0 on"
        )
    return InMemory(x_NCHW, y_N, class_names)


def _convert_bytes(images: Array, range: tuple[float, float] | None) -> Tensor:
    """Convert images to bytes, channels first."""
    x = torch.as_tensor(images)
    if x.dim() == 3:
        x = x[:, None]
    elif isinstance(images, np.ndarray) and x.dim() == 4:
        x = x.permute(0, 3, 1, 2)
    if x.dim() != 4 or x.shape[1] > MOST_CHANNELS or not len(x):
        raise DataError(
            f"images of shape {tuple(images.shape)} are not understood: give tensors as N, C, H, W and "
            "arrays as N, H, W, C"
        )
    if range is None:
        if x.dtype != torch.uint8:
            raise DataError(f"images of {x.dtype} have no range: set range, say to (0, 1)")
        return x.contiguous()
    black, white = range
    x = x.double()
    low, high = float(x.min()), float(x.max())
    if not black <= low <= high <= white or black == white:  # nor is NaN
        raise DataError(
            f"images have values from {low:g} to {high:g}, and range is ({black:g}, {white:g}): set it to "
            "include them"
        )
    return ((x - black) * (255 / (white - black))).round().to(torch.uint8).contiguous()
