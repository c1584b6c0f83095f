"""Read sets into memory: scikit-learn's digits, torchvision's MNIST and CIFAR and their kin."""

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from elastic.data.fetch import guard_fetch
from elastic.data.images import ImageData
from elastic.data.imageset import ImageSet, InMemory
from elastic.data.split import split_stratified


class Digits(ImageData):
    """Provide scikit-learn's 1,797 handwritten digits, 8×8 grey pixels; nothing to download.

    The grey values 0 … 16 are scaled to 0 … 255. The set has no official test split: 360 images, stratified
    by label and the same for every run, are kept apart as one.
    """

    shape = (1, 8, 8)
    classes = 10

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """Read what scikit-learn brings."""
        digits = load_digits()
        images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target).long()
        train, test = split_stratified(labels, count=360, seed=0)
        return InMemory(images[train], labels[train]), InMemory(images[test], labels[test])


class TorchvisionImages(ImageData):
    """Provide a set of torchvision's that keeps all images in `data` and all labels in `targets`.

    So do MNIST, FashionMNIST, KMNIST, CIFAR10 and CIFAR100.

    Args:
        dataset: the class, such as `torchvision.datasets.MNIST`.
        shape: (C, H, W) of its images.
        classes: their number.
        common: see `ImageData`.
    """

    def __init__(self, dataset: Any, shape: tuple[int, int, int], classes: int, **common: Any) -> None:
        super().__init__(**common)
        C, H, W = shape
        self.dataset, self.shape, self.classes = dataset, (C, H, W), classes

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """Read the set, or download it."""
        name = self.dataset.__name__
        folder = Path(self.root) / getattr(self.dataset, "base_folder", f"{name}/raw")
        with guard_fetch(name, folder, download):
            train, test = (self.dataset(self.root, train=part, download=download) for part in (True, False))
            return self._in_memory(train), self._in_memory(test)

    def _in_memory(self, part: Any) -> InMemory:
        x_NCHW, y_N = _move_channels_first(torch.as_tensor(part.data)), torch.as_tensor(part.targets).long()
        # Raised inside `guard_fetch`, which names the folder and the remedy.
        if x_NCHW.dtype != torch.uint8 or tuple(x_NCHW.shape[1:]) != self.shape:
            raise ValueError(f"images are {x_NCHW.dtype} {tuple(x_NCHW.shape[1:])}, not bytes {self.shape}")
        if len(x_NCHW) != len(y_N) or len(y_N) == 0:
            raise ValueError(f"{len(x_NCHW)} images but {len(y_N)} labels")
        if y_N.min() < 0 or y_N.max() >= self.classes:
            raise ValueError(f"labels run from {y_N.min()} to {y_N.max()}, not within {self.classes} classes")
        return InMemory(x_NCHW, y_N, part.classes)


def _move_channels_first(x: Tensor) -> Tensor:
    """Turn N, H, W or N, H, W, C into N, C, H, W."""
    return x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
