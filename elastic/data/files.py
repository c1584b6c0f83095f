"""Decode image files as they are fetched, for sets too large for memory, and find damaged ones before."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torchvision.transforms import v2

from elastic.data.decoding import read_rgb
from elastic.data.imageset import Batch, ImageSet
from elastic.errors import DataError

log = logging.getLogger(__name__)
CHECKED = 50_000  # files that are decoded once before training; of more, each is when it is fetched
THREADS = 4  # Pillow's decoders let others run


class ImageFiles(ImageSet):
    """Decode image files: the shorter side scaled to `size`, the centre square cut out.

    Args:
        paths: of the files.
        labels: of each, an index of `class_names`.
    """

    def __init__(
        self, paths: Sequence[str], labels: Sequence[int], class_names: Sequence[str], size: int
    ) -> None:
        self.paths, self.labels, self.class_names = paths, torch.tensor(labels), class_names
        self.to_bytes = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images = [self.to_bytes(read_rgb(self.paths[i])) for i in indices]
        return torch.stack(images), self.labels[torch.as_tensor(indices)]

    def check(self) -> None:
        """Decode each file once.

        Raises:
            DataError: some cannot be decoded.
        """
        check_each(read_rgb, self.paths)


def check_each(decode: Callable[[Any], object], images: Sequence[Any]) -> None:
    """Decode each image once, unless there are very many.

    Raises:
        DataError: some cannot be decoded.
    """
    if len(images) > CHECKED:
        return

    def find_fault(image: Any) -> DataError | None:
        try:
            decode(image)
        except DataError as error:
            return error
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        faults = [fault for fault in pool.map(find_fault, images) if fault is not None]
    if len(faults) > 1:
        raise DataError(f"{len(faults)} of {len(images)} images cannot be used, the first: {faults[0]}")
    if faults:
        raise faults[0]


@rank_zero_only
def tell(text: str) -> None:
    """Say what becomes of files, once."""
    log.warning(text)
