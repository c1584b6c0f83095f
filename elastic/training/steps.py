"""Say what the step that a run is in means for a call of its network."""

from typing import Any

import lightning as L
import torch


def is_trained_now(trainer: L.Trainer | None) -> bool:
    """Tell whether a call of the network belongs to a training step, whatever mode the network is in."""
    if trainer is None or not trainer.training:
        return False
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(batches.started > batches.processed)


def compute_loss_scale(trainer: L.Trainer | None) -> float | None:
    """Return what the run multiplies its loss with, or None where nothing is trained now."""
    if trainer is None or not is_trained_now(trainer):
        return None
    automatic = trainer.lightning_module.automatic_optimization
    scaler = get_scaler(trainer)
    batches = trainer.accumulate_grad_batches if automatic else 1
    return (scaler.get_scale() if scaler is not None else 1.0) / batches


def get_scaler(trainer: L.Trainer) -> torch.amp.GradScaler | None:
    """Return the gradient scaler of a run in fp16, None in any other precision."""
    return getattr(trainer.precision_plugin, "scaler", None)
