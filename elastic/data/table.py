"""Read sets of image files that a table lists with their labels."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic.data.files import ImageFiles
from elastic.data.images import ImageData
from elastic.data.imageset import ImageSet
from elastic.errors import DataError

COLUMNS = ("path", "label")


class ImageTableData(ImageData):
    """Provide the images that two CSV files list, in columns `path` and `label`.

    Paths are relative to the file that lists them. Labels are any words; their order is that of the alphabet.

    Args:
        size: height and width the images are brought to.
        train, test: the CSV files, relative to `root`.
        common: see `ImageData`.
    """

    def __init__(self, size: int, train: str = "train.csv", test: str = "test.csv", **common: Any) -> None:
        super().__init__(**common)
        self.shape, self.tables = (3, size, size), (Path(self.root, train), Path(self.root, test))
        self._names = sorted({label for _, label in read_table(self.tables[0])})
        self.classes = len(self._names)

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """Read both tables."""
        train, test = (self._list(path) for path in self.tables)
        return train, test

    def _list(self, path: Path) -> ImageFiles:
        rows = read_table(path)
        unknown = sorted({label for _, label in rows} - set(self._names))
        if unknown:
            raise DataError(
                f"{path} has the label '{unknown[0]}', which {self.tables[0]} has not: add images of it"
            )
        files = [path.parent / file for file, _ in rows]
        missing = [file for file in files if not os.path.isfile(file)]  # nor is what no name may be like
        if missing:
            raise DataError(
                f"{path} lists {len(missing)} files that are not there, the first is {missing[0]}"
            )
        labels = [self._names.index(label) for _, label in rows]
        return ImageFiles([str(file) for file in files], labels, self._names, self.shape[1])


def read_table(path: Path) -> Sequence[tuple[str, str]]:
    """Read paths and labels.

    Raises:
        DataError: the table is missing or empty, or lacks a column or a value.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}): set data.root to its folder") from error
    if not rows or not set(COLUMNS) <= set(reader.fieldnames or ()):
        raise DataError(f"{path} is no table of images: begin it with the line 'path,label', an image a line")
    pairs = [(row["path"], row["label"]) for row in rows]
    for number, pair in enumerate(pairs, start=2):
        if not all(pair):
            raise DataError(f"{path}, line {number}, lacks a path or a label: complete or delete it")
    return pairs
