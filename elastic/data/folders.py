"""Sets too large for memory: a folder a class, its images decoded as they are asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from elastic.data.fetch import fetching
from elastic.data.images import ImageData
from elastic.data.imageset import Batch, ImageSet
from elastic.errors import DataError


class ImageFiles(ImageSet):
    """The images of `folder/<class>/*`, their shorter side scaled to `size` and the centre square cut out."""

    def __init__(self, folder: Path, size: int) -> None:
        try:
            found = datasets.ImageFolder(folder)
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} holds no images ({error}): fill it as {folder}/<class>/*.jpg, no class empty, "
                "or set data.root (or ELASTIC_DATA) to the right folder"
            ) from error
        self.folder, self.class_names = folder, found.classes
        self.paths = [path for path, _ in found.samples]
        self.labels = torch.tensor(found.targets)
        self.to_bytes = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return torch.stack([self._decode(self.paths[i]) for i in indices]), self.labels[
            torch.as_tensor(indices)
        ]

    def _decode(self, path: str) -> torch.Tensor:
        try:
            return self.to_bytes(default_loader(path))
        except Exception as error:  # Pillow's decoders fail with OSError, SyntaxError, struct.error, …
            raise DataError(f"{path} is not a readable image: delete or replace it") from error


class ImageFolderData(ImageData):
    """Your own images: `root/train/<class>/*` and `root/test/<class>/*` (or `root/val` for the latter).

    Args:
        size: height and width the images are brought to.
        common: see `ImageData`; `root` is the folder of this set.
    """

    def __init__(self, size: int, **common: Any) -> None:
        super().__init__(**common)
        self.shape = (3, size, size)
        # Listed here already, since a model asks for the number of classes before there is data.
        self._train = ImageFiles(Path(self.root, "train"), size)
        self.classes = len(self._train.class_names)

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        root = Path(self.root)
        test = root / "test" if (root / "test").is_dir() or not (root / "val").is_dir() else root / "val"
        return _same_classes(self._train, ImageFiles(test, self.shape[1]))


class Imagenette(ImageData):
    """Ten easy classes of ImageNet, https://github.com/fastai/imagenette, from its 160-pixel edition.

    Its official validation images serve as the test part.

    Args:
        size: height and width the images are brought to.
        common: see `ImageData`.
    """

    classes = 10

    def __init__(self, size: int = 160, **common: Any) -> None:
        super().__init__(**common)
        self.shape = (3, size, size)

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        folder = Path(self.root, "imagenette2-160")
        with fetching("Imagenette", folder, download):
            datasets.Imagenette(self.root, size="160px", download=download)
        train, test = (ImageFiles(folder / part, self.shape[1]) for part in ("train", "val"))
        if len(train.class_names) != self.classes:
            raise DataError(
                f"Imagenette in {folder} is incomplete ({len(train.class_names)} of {self.classes} classes): "
                "delete that folder, then copy it whole or set data.download=true on a connected machine"
            )
        return _same_classes(train, test)


def _same_classes(train: ImageFiles, test: ImageFiles) -> tuple[ImageFiles, ImageFiles]:
    odd = sorted(set(train.class_names) ^ set(test.class_names))
    if odd:
        raise DataError(
            f"{train.folder} and {test.folder} differ in the class folder {odd[0]}: "
            "give both the same class folders"
        )
    return train, test
