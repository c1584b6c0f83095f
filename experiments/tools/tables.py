"""Write tables as files."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elastic.files.atomic import write_atomically


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as comma-separated values, atomically."""

    text = write_rows(head, rows)
    write_atomically(path, lambda part: part.write_text(text))


def write_rows(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table as the text of comma-separated values."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return file.getvalue()
