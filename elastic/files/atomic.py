"""Put files in place at once."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic.errors import FileError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and put it there at once: a failure leaves what was there.

    Raises:
        FileError: there is no such folder, or the place is one.
    """
    check_place(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # several processes may write one page
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        if error.filename is None:  # a disk that is full does not say where
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, put in place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda part: part.write_text(text))


def check_place(path: Path) -> None:
    """Refuse a place where no file can be.

    Raises:
        FileError: there is no such folder, or the place is one.
    """
    if path.is_dir():
        raise FileError(f"{path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise FileError(f"{path} cannot be written: make the folder {path.parent} first")
