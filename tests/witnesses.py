"""Callbacks that a configuration names, to see what each process of a run holds in the end."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from elastic.callbacks import PruneDynamically


class Witness(L.Callback):
    """Save what each process holds, one file a process."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder.mkdir(exist_ok=True)
        torch.save(self.collect(trainer, pl_module), self.folder / f"{trainer.global_rank}.pt")

    def collect(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        """Collect the network's values."""
        return pl_module.net.state_dict()  # type: ignore[union-attr, operator]


class MultiplierWitness(Witness):
    """Save what each process charges for a kernel."""

    def collect(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        (own,) = (callback for callback in callbacks if isinstance(callback, PruneDynamically))
        return own.multiplier_LS
