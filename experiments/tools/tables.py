"""Write tables as files, and into them."""

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elastic.errors import FileError
from elastic.files.atomic import check_place, write_atomically


def format_spread(values: Sequence[float], digits: int = 2) -> str:
    """Write mean ± sample standard deviation, or the only value."""
    figures = [statistics.fmean(values), *([compute_sd(values)] if len(values) > 1 else [])]
    return " ± ".join(f"{figure:,.{digits}f}" for figure in figures)


def compute_sd(values: Sequence[float]) -> float:
    """Compute the sample standard deviation; NaN where one of the values is no number, or infinite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None) -> None:
    """Print a table, as wide as the terminal by default."""
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


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


def format_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    lines = [[escape_markdown(cell) for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(text: str) -> str:
    """Write what stands in a cell: names of folders may have whatever signs."""
    return text.replace("|", r"\|").replace("<", "&lt;").replace("\n", " ")


def write_between_marks(path: Path, command: str, table: str, of: str = "") -> None:
    """Put what a command has made into a Markdown file, between the marks that name it.

    Args:
        of: what the table is of; where there are marks that name that, too, it goes between them.

    Raises:
        FileError: there is no such file, or it has no such marks.
    """
    text = _replace_between_marks(path, command, table, of)
    write_atomically(path, lambda part: part.write_text(text))


def check_marks(path: Path, command: str, of: str = "") -> None:
    """Refuse a text into which `write_between_marks` could put nothing, before what takes long.

    Raises:
        FileError: there is no such file, or it has no such marks.
    """
    _replace_between_marks(path, command, "", of)


def check_targets(command: str, csv: Path | None, markdown: Path | None) -> None:
    """Refuse places where a command's table cannot be written, before what takes long.

    Raises:
        FileError: there is no such folder, or no text with marks that name the command.
    """
    check_places(csv)
    if markdown is not None:
        check_marks(markdown, command)


def check_places(*paths: Path | None) -> None:
    """Refuse places where no file can be, before what takes long; those that are not asked for are None.

    Raises:
        FileError: there is no such folder, or the place is one.
    """
    for path in paths:
        if path is not None:
            check_place(path)


def _replace_between_marks(path: Path, command: str, table: str, of: str = "") -> str:
    if not path.exists():
        raise FileError(f"{path} is missing: write it first, with a place for the table")
    check_place(path)
    text = path.read_text()
    name = f"{command} {of}" if f"`elastic {command} {of}`" in text else command
    begin, end = (f"<!-- {part} of `elastic {name}` -->" for part in ("begin", "end"))
    return replace_table(text, table, begin, end)


def replace_table(text: str, table: str, begin: str, end: str) -> str:
    """Put the table between the marks of a text.

    Raises:
        FileError: the text has no such marks.
    """
    marked = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not marked.search(text):
        raise FileError(f"there is no place for the table: put '{begin}' and '{end}' around it")
    return marked.sub(lambda _: f"{begin}\n{table}\n{end}", text)
