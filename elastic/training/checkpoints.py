"""Write checkpoints that are whole or not there, and read them back if they are what was written.

The archive's comment is a digest of all bytes before it: any program reads the file as before.
"""

import hashlib
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from elastic.errors import FileError
from elastic.files.atomic import write_atomically

END, END_SIZE = b"PK\x05\x06", 22  # the last record of a zip archive, which ends in its comment's length
MARK = b"sha256="  # the comment, with a digest in hexadecimal behind it
COMMENT_SIZE = len(MARK) + 64
REMEDY = "restore it, or remove it and train again"


class AtomicCheckpoints(TorchCheckpointIO):
    """Write checkpoints beside their place: a temporary file elsewhere may be copied half-way."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # torch.save hides what goes wrong with a file
        torch.save(checkpoint, buffer)
        content = add_digest(buffer.getvalue())
        write_atomically(Path(path), lambda part: part.write_bytes(content))

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        if weights_only is False:  # a program of the user's own that says so
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint of tensors and plain containers; one without a digest is read as it is.

    Raises:
        FileError: it is missing or damaged, or holds anything else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
    if not is_intact(content):
        raise FileError(f"{path} is damaged, its digest is that of other contents: {REMEDY}")
    try:
        with warnings.catch_warnings():  # of kinds of pickle
            warnings.simplefilter("ignore")
            checkpoint = torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:  # whose words tell how to read it all the same
        raise FileError(
            f"{path} is damaged or holds more than plain containers, which is never read: {REMEDY}"
        ) from error
    except Exception as error:  # pickle raises whatever the bytes make it do
        raise FileError(f"{path} is damaged ({type(error).__name__}): {REMEDY}") from error
    if not isinstance(checkpoint, dict):
        raise FileError(f"{path} is no checkpoint: {REMEDY}")
    return checkpoint


def add_digest(content: bytes) -> bytes:
    """Give a zip archive without a comment the digest of its contents as one."""
    body = content[:-2] + COMMENT_SIZE.to_bytes(2, "little") + MARK
    return body + hashlib.sha256(body).hexdigest().encode()


def is_intact(content: bytes) -> bool:
    """Tell whether an archive has the digest of its contents, or none."""
    if not content.startswith(b"PK"):
        return True  # of another kind, that has none
    if content[-END_SIZE:][:4] == END and content.endswith(b"\0\0"):
        return True  # of an earlier version, or another program
    body, digest = content[:-64], content[-64:]
    return body.endswith(MARK) and hashlib.sha256(body).hexdigest().encode() == digest
