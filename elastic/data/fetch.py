"""Ask torchvision for a set of images: never wait for long, and fail in one line."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic.errors import DataError

SILENCE_S = 15.0
"""A download that receives nothing for so long has failed; torchvision itself would wait for ever."""


@contextmanager
def guard_fetch(name: str, folder: Path, download: bool) -> Iterator[None]:
    """Run torchvision's constructor inside, and turn what it raises into a `DataError`.

    The error tells missing from corrupt.

    Args:
        name: of the data set.
        folder: that holds it.
        download: whether the constructor may fetch it.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)
    try:
        yield
    except Exception as error:  # from AssertionError to zlib.error, depending on the byte that is wrong
        for path in missing:  # leave no folder behind that was created for a download which then failed
            with suppress(OSError):  # it is not there, or it is not empty
                path.rmdir()
        raise DataError(_explain(name, folder, error, download)) from error
    finally:
        socket.setdefaulttimeout(timeout_s)


def _explain(name: str, folder: Path, error: Exception, download: bool) -> str:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    if _has_content(folder):
        return (
            f"{name} in {folder} is incomplete or corrupt ({reason}): delete that folder, "
            "then copy it whole or set data.download=true on a connected machine"
        )
    if not download:
        return (
            f"{name} not found in {folder}: set data.root (or ELASTIC_DATA) to a folder that holds it, "
            "or data.download=true on a connected machine"
        )
    return (
        f"{name} not found in {folder} and not downloaded ({reason}): set data.root (or ELASTIC_DATA) "
        "to a folder that holds it, or run once on a connected machine"
    )


def _has_content(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:  # absent, not a folder, or not ours to read
        return False
