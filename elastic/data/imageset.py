"""Fetch images of a set by the batch, as bytes.

Shapes: B samples of a batch, N of the set, C channels, H rows, W columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor]


class ImageSet(Dataset[Batch], ABC):
    """Fetch images as bytes with their labels, by the batch.

    Attributes:
        labels: the targets: y_N in int64, labels or values y_NK, masks y_NHW.
        class_names: in the order of the labels, if they are known.
    """

    labels: Tensor
    class_names: Sequence[str] = ()

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Fetch x_BCHW in uint8 and their targets."""

    def check(self) -> None:
        """Find what cannot be fetched, before training.

        Raises:
            DataError: there is something.
        """

    def __getitem__(self, index: int) -> Batch:
        x_BCHW, y_B = self.__getitems__([index])
        return x_BCHW[0], y_B[0]

    def __len__(self) -> int:
        return len(self.labels)


class InMemory(ImageSet):
    """Hold images x_NCHW in uint8 as one tensor."""

    def __init__(self, x_NCHW: Tensor, y_N: Tensor, class_names: Sequence[str] = ()) -> None:
        self.images, self.labels, self.class_names = x_NCHW, y_N, class_names

    def to(self, device: torch.device) -> None:
        """Move images and labels to a device, on which they are then gathered into batches."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index_B = torch.as_tensor(indices)
        if self.images.is_cuda:  # else the GPU would be waited for
            index_B = index_B.pin_memory().to(self.images.device, non_blocking=True)
        return self.images[index_B], self.labels[index_B]
