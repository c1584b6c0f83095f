"""Read sets too large for memory: a folder a class, its images decoded as they are fetched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from elastic.data.fetch import guard_fetch
from elastic.data.images import ImageData
from elastic.data.imageset import Batch, ImageSet
from elastic.errors import DataError
from elastic.ranges import Count, checked

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B")  # modes of Pillow, whose conversion would clip them at 255


class VisibleFolders(datasets.ImageFolder):
    """List images a folder a class, without hidden folders and files, such as `.ipynb_checkpoints`."""

    def __init__(self, folder: Path) -> None:
        suffixes = datasets.folder.IMG_EXTENSIONS

        def is_shown(path: str) -> bool:
            parts = Path(path).relative_to(folder).parts
            return path.lower().endswith(suffixes) and not any(part.startswith(".") for part in parts)

        super().__init__(folder, is_valid_file=is_shown)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Find the folders that are shown."""
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not names:
            raise FileNotFoundError(f"no class folder in {directory}")
        return names, {name: k for k, name in enumerate(names)}


class ImageFiles(ImageSet):
    """Decode images of `folder/<class>/*`: the shorter side scaled to `size`, the centre square cut out."""

    def __init__(self, folder: Path, size: int) -> None:
        try:
            files = VisibleFolders(folder)
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} holds no images ({error}): fill it as {folder}/<class>/*.jpg, no class empty, "
                "or set data.root (or ELASTIC_DATA) to the right folder"
            ) from error
        self.folder, self.class_names = folder, files.classes
        self.paths = [path for path, _ in files.samples]
        self.labels = torch.tensor(files.targets)
        self.to_bytes = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images = [self._decode(self.paths[i]) for i in indices]
        return torch.stack(images), self.labels[torch.as_tensor(indices)]

    def _decode(self, path: str) -> torch.Tensor:
        try:
            return self.to_bytes(read_rgb(path))
        except DataError:
            raise
        except Exception as error:  # Pillow's decoders fail with OSError, SyntaxError, struct.error, …
            raise DataError(f"{path} is not a readable image: delete or replace it") from error


def read_rgb(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, whatever mode it has.

    Raises:
        DataError: its values have no declared range.
    """
    with Image.open(path) as image:
        # Older versions of Pillow open 16-bit PNG files in the mode of 32 bits.
        if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format == "PNG"):
            grey = (np.asarray(image, dtype=np.float32) / 257).round().astype(np.uint8)  # 65,535 is 255
            return Image.fromarray(grey).convert("RGB")
        if image.mode in ("I", "F"):
            raise DataError(f"{path} has values of an unknown range: save it with 8 or 16 bits")
        return image.convert("RGB")


@checked
class ImageFolderData(ImageData):
    """Provide your own images: `root/train/<class>/*` and `root/test/<class>/*` (or `root/val`).

    Args:
        size: height and width the images are brought to.
        common: see `ImageData`; `root` is the folder of this set.
    """

    def __init__(self, size: Count, **common: Any) -> None:
        super().__init__(**common)
        self.shape = (3, size, size)
        # Listed here already, since a model asks for the number of classes before there is data.
        self._train = ImageFiles(Path(self.root, "train"), size)
        self.classes = len(self._train.class_names)

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """List the images of both parts."""
        root = Path(self.root)
        test = root / "test" if (root / "test").is_dir() or not (root / "val").is_dir() else root / "val"
        return _check_classes(self._train, ImageFiles(test, self.shape[1]))


@checked
class Imagenette(ImageData):
    """Provide ten easy classes of ImageNet, https://github.com/fastai/imagenette, from its 160-pixel edition.

    Its official validation images serve as the test part.

    Args:
        size: height and width the images are brought to.
        common: see `ImageData`.
    """

    classes = 10

    def __init__(self, size: Count = 160, **common: Any) -> None:
        super().__init__(**common)
        self.shape = (3, size, size)

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """List the images of both parts, or download them."""
        folder = Path(self.root, "imagenette2-160")
        with guard_fetch("Imagenette", folder, download):
            datasets.Imagenette(self.root, size="160px", download=download)
        train, test = (ImageFiles(folder / part, self.shape[1]) for part in ("train", "val"))
        if len(train.class_names) != self.classes:
            raise DataError(
                f"Imagenette in {folder} is incomplete ({len(train.class_names)} of {self.classes} classes): "
                "delete that folder, then copy it whole or set data.download=true on a connected machine"
            )
        return _check_classes(train, test)


def _check_classes(train: ImageFiles, test: ImageFiles) -> tuple[ImageFiles, ImageFiles]:
    different = sorted(set(train.class_names) ^ set(test.class_names))
    if different:
        raise DataError(
            f"{train.folder} and {test.folder} differ in the class folder {different[0]}: "
            "give both the same class folders"
        )
    return train, test
