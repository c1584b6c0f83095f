"""Provide images that are in memory already, as arrays or tensors of a declared range."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastic.data.images import ImageData
from elastic.data.imageset import ImageSet, InMemory
from elastic.errors import DataError

Array = Tensor | np.ndarray[Any, Any]
MOST_CHANNELS, FEW = 16, 4  # more, or more where another side has few, are channels that stand elsewhere
SLACK = 1e-6  # of a range, that rounding may exceed it by


class ArrayData(ImageData):
    """Provide images and labels that are in memory.

    Images are N, H, W in grey, otherwise tensors are N, C, H, W and NumPy's arrays N, H, W, C. They are kept
    as bytes: what has more than 256 values is rounded to as many.

    Args:
        train, test: images and labels 0, 1, 2, … of each part.
        range: what is black and what is white; bytes have 0 and 255 by default.
        class_names: in the order of the labels; without them each class has training images.
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
        images = [_convert_bytes(part[0], range) for part in (train, test)]
        labels = [_read_labels(part[1]) for part in (train, test)]
        self.classes = max(int(label_N.max()) for label_N in labels) + 1
        if class_names and len(class_names) != self.classes:
            raise DataError(
                f"{len(class_names)} class_names for {self.classes} classes: give one for each label"
            )
        self._parts = [_join(*pair, class_names) for pair in zip(images, labels, strict=True)]
        if not class_names:
            _reject_gaps(labels[0], self.classes)
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


def _reject_gaps(y_N: Tensor, classes: int) -> None:
    """Refuse classes without training images, such as the first where labels begin at 1."""
    label_L = y_N.unique()  # at most as many as there are labels, whatever their numbers
    if len(label_L) < classes:
        missing = next(k for k in range(classes) if k >= len(label_L) or label_L[k] != k)
        raise DataError(
            f"no training image has the label {missing} of 0 … {classes - 1}: number the labels from 0 on "
            "without gaps, or give class_names"
        )


def _make_tensor(values: Any, kind: str) -> Tensor:
    """Make a tensor of an array in whatever byte order and layout, or of a list.

    Raises:
        DataError: it is none of numbers, or empty.
    """
    if isinstance(values, Tensor):
        tensor = values.detach()
    else:
        try:
            array = np.asarray(values)
            # torch takes neither other byte orders, nor strides below zero, nor what cannot be written.
            array = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
            tensor = torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            raise DataError(f"{kind} are no array of numbers: give a tensor or an array") from error
    if tensor.is_complex() or not tensor.dim() or not tensor.numel():
        raise DataError(f"{kind} are no array of numbers ({tuple(tensor.shape)}): give a tensor or an array")
    return tensor


def _read_labels(labels: Any) -> Tensor:
    """Read labels y_N, or masks y_NHW."""
    y_N = _make_tensor(labels, "labels")
    if y_N.dim() == 2 and y_N.shape[1] == 1:  # as Keras has them
        y_N = y_N[:, 0]
    if y_N.dim() not in (1, 3):
        raise DataError(f"labels have the shape {tuple(y_N.shape)}: give a class number an image")
    whole_N = y_N.long()
    if not torch.equal(whole_N.to(y_N.dtype), y_N):  # nor is NaN
        raise DataError(f"labels are no whole numbers ({y_N.dtype}): give class numbers 0, 1, 2, …")
    return whole_N


def _convert_bytes(images: Any, range: tuple[float, float] | None) -> Tensor:
    """Convert images to bytes, channels first."""
    x = _make_tensor(images, "images")
    shape = tuple(x.shape)
    if x.dim() == 3:
        x = x[:, None]
    elif not isinstance(images, Tensor) and x.dim() == 4:
        x = x.permute(0, 3, 1, 2)
    if x.dim() != 4 or x.shape[1] > MOST_CHANNELS or _has_channels_elsewhere(shape, x.shape[1]):
        raise DataError(
            f"images of shape {shape} are not understood: give tensors as N, C, H, W and arrays as N, H, W, C"
        )
    if range is None:
        if x.dtype != torch.uint8:
            raise DataError(f"images of {x.dtype} have no range: set range, say to (0, 1)")
        return x.contiguous()
    return _scale(x, *_check_range(range))


def _has_channels_elsewhere(shape: Sequence[int], channels: int) -> bool:
    """Tell whether another side looks like that of the channels: 8, 8, 3 is no image of 8 channels."""
    return len(shape) == 4 and channels > FEW and min(shape[1], shape[3]) <= FEW


def _check_range(range: Any) -> tuple[float, float]:
    try:
        black, white = map(float, range)
    except (TypeError, ValueError) as error:
        raise DataError(f"range={range} cannot be: set it to two numbers, say to (0, 1)") from error
    if not (isfinite(black) and isfinite(white) and black < white):
        raise DataError(f"range={range} cannot be: set it to what is black and what is white, say to (0, 1)")
    return black, white


def _scale(x: Tensor, black: float, white: float) -> Tensor:
    """Scale values from black to white to 0 … 255."""
    x = x.double()
    low, high, slack = float(x.min()), float(x.max()), SLACK * (white - black)
    extent = f"images have values from {low:g} to {high:g}, and range is ({black:g}, {white:g})"
    if not black - slack <= low <= high <= white + slack:  # nor is NaN
        raise DataError(f"{extent}: set it to include them")
    bytes_NCHW = ((x - black) * (255 / (white - black))).round().clamp(0, 255).to(torch.uint8).contiguous()
    if low < high and int(bytes_NCHW.max()) - int(bytes_NCHW.min()) < 2:  # as from 0 to 1 within (0, 255)
        raise DataError(f"{extent}, of which they would have two levels at most: set it to what they have")
    return bytes_NCHW
