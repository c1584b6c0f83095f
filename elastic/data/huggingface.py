"""Provide a data set of Hugging Face: from its hub, from a folder, or in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import v2

from elastic.data.decoding import convert_rgb
from elastic.data.files import check_each
from elastic.data.images import ImageData
from elastic.data.imageset import Batch, ImageSet
from elastic.errors import DataError, cite


class HuggingFaceImages(ImageData):
    """Provide images of a data set with a column of images and one of class labels (extra `datasets`).

    Args:
        dataset: its name on the hub, or a folder, also of `save_to_disk`; or splits that have been loaded.
        size: height and width the images are brought to.
        image, label: the columns.
        train, test: the splits.
        common: see `ImageData`; `root` is where downloads are kept.
    """

    def __init__(
        self,
        dataset: str | Mapping[str, Any],
        size: int,
        image: str = "image",
        label: str = "label",
        train: str = "train",
        test: str = "test",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.shape, self.columns = (3, size, size), (image, label)
        parts = [_load_split(dataset, split, self.root) for split in (train, test)]
        self._parts = [DecodedColumn(part, image, label, size) for part in parts]
        names, others = (part.class_names for part in self._parts)
        if list(names) != list(others):
            raise DataError(
                f"'{train}' and '{test}' name their classes differently: cast both to one ClassLabel"
            )
        self.known_names, self.classes = names, len(names)

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """Return both splits."""
        return self._parts[0], self._parts[1]


def _load_split(dataset: str | Mapping[str, Any], split: str, cache: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{error.name} is not installed: install the extra `datasets`") from error
    try:
        if not isinstance(dataset, str):
            return dataset[split]
        if Path(dataset, "dataset_dict.json").is_file():  # of its `save_to_disk`
            return datasets.load_from_disk(str(Path(dataset, split)))
        return datasets.load_dataset(dataset, split=split, cache_dir=cache)
    except Exception as error:  # of its own, of the network, of the file system
        cause = cite(error)
        shown = dataset if isinstance(dataset, str) else f"the split '{split}'"
        raise DataError(f"{shown} cannot be loaded ({cause}): set data.dataset, .train and .test") from error


class DecodedColumn(ImageSet):
    """Decode a split's images as they are fetched."""

    def __init__(self, split: Any, image: str, label: str, size: int) -> None:
        features = split.features if hasattr(split, "features") and hasattr(split, "__len__") else {}
        names = getattr(features.get(label), "names", None)
        if names is None or not hasattr(features.get(image), "decode_example"):
            raise DataError(
                f"the data set has no images in '{image}' or no class labels (ClassLabel) in '{label}': set "
                f"data.image and data.label to two of {', '.join(features) or 'a split that is held whole'}"
            )
        labels = split[label][:]
        if None in labels:
            raise DataError(f"{labels.count(None)} images have no label in '{label}': leave them out")
        self.split, self.image, self.class_names = split, image, names
        self.labels = torch.as_tensor(labels)
        self.to_bytes = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        bytes_BCHW = torch.stack([self.to_bytes(self._decode(i)) for i in indices])
        return bytes_BCHW, self.labels[torch.as_tensor(indices)]

    def check(self) -> None:
        """Decode each image once.

        Raises:
            DataError: some cannot be decoded.
        """
        check_each(self._decode, range(len(self)))

    def _decode(self, index: int) -> Image.Image:
        try:
            return convert_rgb(self.split[int(index)][self.image], f"image {index}")
        except DataError:
            raise
        except Exception as error:  # Pillow's decoders fail with OSError, SyntaxError, struct.error, …
            raise DataError(f"image {index} of the data set is not readable: leave it out") from error
