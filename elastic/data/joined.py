"""Join sets of images to one, each with classes of its own."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.data.images import ImageData
from elastic.data.imageset import ImageSet, InMemory
from elastic.data.sets import TorchvisionImages
from elastic.errors import DataError


class JoinedImages(ImageData):
    """Provide several sets of torchvision's as one: the classes of each stand behind those of the one before.

    Smaller images are padded with black on all sides, grey ones repeated for each channel.

    Args:
        sets: of `TorchvisionImages`, by name: their dataset, shape and classes are used.
        common: see `ImageData`.
    """

    def __init__(self, sets: Mapping[str, TorchvisionImages], **common: Any) -> None:
        super().__init__(**common)
        self.sets = dict(sets)
        channels, heights, widths = zip(*(data.shape for data in self.sets.values()), strict=True)
        self.shape = (max(channels), max(heights), max(widths))
        self.classes = sum(data.classes for data in self.sets.values())
        if odd := [name for name, data in self.sets.items() if data.shape[0] not in (1, self.shape[0])]:
            raise DataError(f"images of {odd[0]} have neither 1 nor {self.shape[0]} channels: leave it out")

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """Read each set, or download it, and join them."""
        parts = [data.load(download) for data in self.sets.values()]
        train, test = (self._join(list(splits)) for splits in zip(*parts, strict=True))
        return train, test

    def _join(self, parts: list[Any]) -> InMemory:
        images, labels, names, offset = [], [], [], 0
        for (name, data), part in zip(self.sets.items(), parts, strict=True):
            images.append(self._fit_shape(part.images))
            labels.append(part.labels + offset)
            names += [f"{name} {label}" for label in part.class_names or range(data.classes)]
            offset += data.classes
        return InMemory(torch.cat(images), torch.cat(labels), names)

    def _fit_shape(self, x_NCHW: Tensor) -> Tensor:
        C, H, W = self.shape
        rows, columns = H - x_NCHW.shape[2], W - x_NCHW.shape[3]
        sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return F.pad(x_NCHW, sides).expand(-1, C, -1, -1)
