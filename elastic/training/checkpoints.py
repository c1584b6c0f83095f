"""Write checkpoints that are whole or not there."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from elastic.files.atomic import write_atomically


class AtomicCheckpoints(TorchCheckpointIO):
    """Write checkpoints beside their place: a temporary file elsewhere may be copied half-way."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # torch.save hides what goes wrong with a file
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), lambda part: part.write_bytes(buffer.getbuffer()))
