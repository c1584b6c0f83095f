"""Read sets of image files from a folder a class."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision import datasets

from elastic.data.decoding import list_suffixes
from elastic.data.fetch import guard_fetch
from elastic.data.files import ImageFiles, tell
from elastic.data.images import ImageData
from elastic.data.imageset import ImageSet
from elastic.errors import DataError
from elastic.ranges import Count, checked

# Folders that systems leave among others, beside hidden ones.
SYSTEM = ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")


def list_folder(folder: Path, size: int) -> ImageFiles:
    """List the images of `folder/<class>/**`: what Pillow reads, and is not hidden; the rest is counted.

    Raises:
        DataError: there are no images, or none of a class.
    """
    classes = sorted(path.name for path in _list_shown(folder) if path.is_dir())
    if not classes:
        raise _refuse(folder, "no class folder is in it")
    paths: list[str] = []
    labels: list[int] = []
    skipped: Counter[str] = Counter()
    for label, name in enumerate(classes):
        files = _list_files(folder / name, [folder.resolve()])
        images = [path for path in files if path.suffix.lower() in list_suffixes()]
        if not images:
            raise _refuse(folder, f"none is in {name}")
        skipped.update(path.suffix or path.name for path in set(files) - set(images))
        paths += map(str, images)
        labels += [label] * len(images)
    if skipped:
        tell(
            f"{folder}: {skipped.total()} files are no images and are skipped ({', '.join(sorted(skipped))})"
        )
    return ImageFiles(paths, labels, classes, size)


def _list_shown(folder: Path) -> list[Path]:
    """List what is in a folder, without hidden files and folders, such as `.ipynb_checkpoints`."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name not in SYSTEM)


def _list_files(folder: Path, above: Sequence[Path]) -> list[Path]:
    """List the files of a folder and of those in it, but for links to one that it lies in."""
    real = folder.resolve()
    if real in above:
        return []
    files: list[Path] = []
    for path in _list_shown(folder):
        files += _list_files(path, (*above, real)) if path.is_dir() else [path]
    return files


def _refuse(folder: Path, cause: str) -> DataError:
    return DataError(
        f"{folder} holds no images ({cause}): fill it as {folder}/<class>/*.jpg, no class empty, "
        "or set data.root (or ELASTIC_DATA) to the right folder"
    )


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
        self._train = list_folder(Path(self.root, "train"), size)
        self.known_names = self._train.class_names
        self.classes = len(self.known_names)

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """List the images of both parts."""
        root = Path(self.root)
        test = root / "test" if (root / "test").is_dir() or not (root / "val").is_dir() else root / "val"
        return _load_parts(self._train, root / "train", test, self.shape[1])


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
        train = list_folder(folder / "train", self.shape[1])
        if len(train.class_names) != self.classes:
            raise DataError(
                f"Imagenette in {folder} is incomplete ({len(train.class_names)} of {self.classes} classes): "
                "delete that folder, then copy it whole or set data.download=true on a connected machine"
            )
        return _load_parts(train, folder / "train", folder / "val", self.shape[1])


def _load_parts(
    train: ImageFiles, train_folder: Path, folder: Path, size: int
) -> tuple[ImageFiles, ImageFiles]:
    """List the test part of a set, too, which has the classes of the training part."""
    test = list_folder(folder, size)
    different = sorted(set(train.class_names) ^ set(test.class_names))
    if different:
        raise DataError(
            f"{train_folder} and {folder} differ in the class folder {different[0]}: "
            "give both the same class folders"
        )
    return train, test
