"""Write tables as files."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elastic.files.atomic import write_atomically


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as comma-separated values, atomically."""

    def write(part: Path) -> None:
        with part.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            writer.writerows(rows)

    write_atomically(path, write)
