"""Lightning programs that know nothing of this library, on a few random images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

IMAGES, CLASSES, BATCH = 128, 4, 32
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def make_network(width: int = 6) -> nn.Sequential:
    """Make two convolutions, with norms, and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES)),
    )


def make_data(seed: int = 0) -> TensorDataset:
    """Make images whose class is the quarter that is bright."""
    generator = torch.Generator().manual_seed(seed)
    x_NCHW = torch.randn(IMAGES, 1, 8, 8, generator=generator)
    y_N = torch.randint(CLASSES, (IMAGES,), generator=generator)
    for x_CHW, y in zip(x_NCHW, y_N.tolist(), strict=True):
        x_CHW[:, 4 * (y // 2) : 4 * (y // 2) + 4, 4 * (y % 2) : 4 * (y % 2) + 4] += 1.5
    return TensorDataset(x_NCHW, y_N)


VALIDATION = make_data(1)


class Program(L.LightningModule):
    """Train a classifier as the first page of Lightning's documentation does."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = make_network() if net is None else net

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.net(x_BCHW)
        return logits_BK

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x_BCHW, y_B = batch
        loss = F.cross_entropy(self(x_BCHW), y_B)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x_BCHW, y_B = batch
        self.log("val/acc", (self(x_BCHW).argmax(1) == y_B).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Adversary(Program):
    """Train by hand, with two optimizers that step in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x_BCHW, y_B = batch
        for optimizer in self.optimizers():
            loss = F.cross_entropy(self(x_BCHW), y_B)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, last = list(self.net[:3].parameters()), list(self.net[3:].parameters())
        return torch.optim.SGD(first, lr=1e-2), torch.optim.AdamW(last, lr=1e-2)


class Spy(L.Callback):
    """Call functions by the name of the hook: `Spy(on_train_epoch_end=lambda trainer, module: …)`."""

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        vars(self).update(hooks)


class Killed(Exception):
    """Stand for a process that ends."""


def kill_at(batch: int) -> Spy:
    """End a run before so many batches of it have been trained."""

    def kill(trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == batch:
            raise Killed

    return Spy(on_train_batch_start=kill)


def fit(
    module: L.LightningModule,
    callbacks: Sequence[L.Callback],
    folder: Path | None = None,
    checkpoint: str | None = None,
    every: int | None = None,
    at_epoch_end: bool = False,
    loader: DataLoader[Any] | None = None,
    validation: Dataset[Any] | None = VALIDATION,
    **options: Any,
) -> L.Trainer:
    """Fit a module to the images for a few epochs.

    Args:
        folder: where a checkpoint is kept, each epoch or each `every` batches; none without.
        checkpoint: the one to go on from.
        at_epoch_end: keep it when all callbacks have noted the epoch, not right after validation.
        loader: of training batches, where it is not that of the images.
        validation: other images, or none.
    """
    when = {"every_n_train_steps": every, "save_on_train_epoch_end": at_epoch_end or None}
    keep = [ModelCheckpoint(folder, "last", enable_version_counter=False, **when)] if folder else []
    trainer = L.Trainer(
        **{
            "max_epochs": 6,
            "accelerator": "cpu",
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            **options,
        },
        callbacks=[*callbacks, *keep],
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(make_data(), BATCH) if loader is None else loader
    held_out = None if validation is None else DataLoader(validation, BATCH)
    trainer.fit(module, loader, held_out, ckpt_path=checkpoint)
    return trainer
