"""Provide a data set of Hugging Face: from its hub, or from a folder."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.transforms import v2

from elastic.data.decoding import convert_rgb
from elastic.data.images import ImageData
from elastic.data.imageset import Batch, ImageSet
from elastic.errors import DataError


class HuggingFaceImages(ImageData):
    """Provide images of a data set with a column of images and one of class labels (extra `datasets`).

    Args:
        dataset: its name on the hub, or a folder.
        size: height and width the images are brought to.
        image, label: the columns.
        train, test: the splits.
        common: see `ImageData`; `root` is where downloads are kept.
    """

    def __init__(
        self,
        dataset: str,
        size: int,
        image: str = "image",
        label: str = "label",
        train: str = "train",
        test: str = "test",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.shape, self.columns = (3, size, size), (image, label)
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"{error.name} is not installed: install the extra `datasets`") from error
        try:
            parts = [
                datasets.load_dataset(dataset, split=split, cache_dir=self.root) for split in (train, test)
            ]
        except Exception as error:  # of its own, of the network, of the file system
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{dataset} cannot be loaded ({cause}): set data.dataset, .train and .test"
            ) from error
        self._parts = [DecodedColumn(part, image, label, size) for part in parts]
        self.classes = len(self._parts[0].class_names)

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """Return both splits."""
        return self._parts[0], self._parts[1]


class DecodedColumn(ImageSet):
    """Decode a split's images as they are fetched."""

    def __init__(self, split: Any, image: str, label: str, size: int) -> None:
        names = getattr(split.features.get(label), "names", None)
        if names is None or image not in split.features:
            raise DataError(
                f"the data set has no images in '{image}' or no class labels in '{label}': set data.image "
                f"and data.label to two of {', '.join(split.features)}"
            )
        self.split, self.image, self.class_names = split, image, names
        self.labels = torch.as_tensor(split[label][:])
        self.to_bytes = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        try:
            images = self.split[list(indices)][self.image]
        except Exception as error:  # Pillow's decoders fail with OSError, SyntaxError, struct.error, …
            raise DataError(f"images {list(indices)} cannot be decoded: repair the data set") from error
        bytes_BCHW = torch.stack([self.to_bytes(convert_rgb(image, self.image)) for image in images])
        return bytes_BCHW, self.labels[torch.as_tensor(indices)]
