"""Read sets of image files that a table lists with their labels."""

import csv
import io
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from elastic.data.files import ImageFiles, tell
from elastic.data.images import ImageData
from elastic.data.imageset import ImageSet
from elastic.errors import DataError

COLUMNS = ("path", "label")


class ImageTableData(ImageData):
    """Provide the images that two CSV files list, in columns `path` and `label`.

    Paths are relative to the file that lists them. Labels are any words; their order is that of the alphabet,
    of whole numbers that of their values. Commas, semicolons or tabs may lie between columns.

    Args:
        size: height and width the images are brought to.
        train, test: the CSV files, relative to `root`.
        common: see `ImageData`.
    """

    def __init__(self, size: int, train: str = "train.csv", test: str = "test.csv", **common: Any) -> None:
        super().__init__(**common)
        self.shape, self.tables = (3, size, size), (Path(self.root, train), Path(self.root, test))
        self.known_names = _sort_labels({label for _, label in read_table(self.tables[0])})
        self.classes = len(self.known_names)

    def load(self, download: bool) -> tuple[ImageSet, ImageSet]:
        """Read both tables."""
        train, test = (self._list(path) for path in self.tables)
        return train, test

    def _list(self, path: Path) -> ImageFiles:
        rows = read_table(path)
        unknown = _sort_labels({label for _, label in rows} - set(self.known_names))
        if unknown:
            raise DataError(
                f"{path} has the label '{unknown[0]}', which {self.tables[0]} has not: add images of it"
            )
        labels = _merge_rows(path, rows)
        if len(labels) < len(rows):
            tell(f"{path}: {len(rows) - len(labels)} lines list a file again and are skipped")
        files = [path.parent / file for file in labels]
        missing = [file for file in files if not os.path.isfile(file)]  # nor is what no name may be like
        if missing:
            raise DataError(
                f"{path} lists {len(missing)} files that are not there, the first is {missing[0]}"
            )
        indices = [self.known_names.index(label) for label in labels.values()]
        return ImageFiles([str(file) for file in files], indices, self.known_names, self.shape[1])


def _sort_labels(labels: Collection[str]) -> list[str]:
    are_numbers = all(label.removeprefix("-").isdecimal() for label in labels)
    return sorted(labels, key=(lambda label: (int(label), label)) if are_numbers else None)


def _merge_rows(path: Path, rows: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the label of each file; one that is listed twice would be trained on and validated with.

    Raises:
        DataError: one has two labels.
    """
    labels: dict[str, str] = {}
    for file, label in rows:
        if labels.setdefault(file, label) != label:
            raise DataError(f"{path} gives {file} the labels '{labels[file]}' and '{label}': delete one line")
    return labels


def read_table(path: Path) -> Sequence[tuple[str, str]]:
    """Read paths and labels.

    Raises:
        DataError: the table is missing or empty, or lacks a column or a value.
    """
    text = _read_text(path)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        lines = [(reader.line_num, [value.strip() for value in row]) for row in reader]
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}, cannot be read ({error}): mend its quotes"
        ) from error
    (_, head), *rows = [line for line in lines if any(line[1])] or [(0, [])]
    if not rows or any(head.count(name) != 1 for name in COLUMNS):
        raise DataError(f"{path} is no table of images: begin it with the line 'path,label', an image a line")
    return [_read_row(f"{path}, line {number},", head, row) for number, row in rows]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read ({error}): save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): set data.root to its folder") from error


def _read_row(place: str, head: Sequence[str], row: Sequence[str]) -> tuple[str, str]:
    if any(row[len(head) :]):
        raise DataError(f"{place} has more values than the first line: put quotes around a comma's label")
    path, label = (row[head.index(name)] if head.index(name) < len(row) else "" for name in COLUMNS)
    if not path or not label:
        raise DataError(f"{place} lacks a path or a label: complete or delete it")
    return path, label
