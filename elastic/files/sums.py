"""Sum up the texts of a finished run in `SHA256SUMS`, and see by it whether they are still those.

`sha256sum -c SHA256SUMS` does the same.
"""

import logging
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from elastic.files.atomic import write_atomically

SUMS = "SHA256SUMS"

logger = logging.getLogger(__name__)


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Sum up those of the named files that a folder has."""
    files = (folder / name for name in names)
    lines = [_write_line(file) for file in files if file.exists()]
    write_atomically(folder / SUMS, lambda part: part.write_text("".join(lines)))


def check_sum(file: Path) -> None:
    """Warn, in the log, of a text that is not as it was when its folder was summed up, if it was.

    It may have been changed on purpose.

    Raises:
        OSError: it cannot be read.
    """
    sums = file.with_name(SUMS)
    if sums.exists() and _write_line(file).encode() not in sums.read_bytes():
        logger.warning("%s is not what %s says: restore it, or remove %s if you changed it", file, SUMS, SUMS)


def find_digest(file: Path) -> str:
    """Find the digest of a file's contents."""
    return sha256(file.read_bytes()).hexdigest()


def _write_line(file: Path) -> str:
    return f"{find_digest(file)}  {file.name}\n"
