"""Measure how far a run is, whatever bounds it."""

import math

import lightning as L
from lightning.pytorch.callbacks import Timer

from elastic.errors import TrainingError
from elastic.training.kinds import is_kind


def measure_epoch_progress(trainer: L.Trainer, epoch: int | None = None) -> float:
    """Return the part of the run (0 … 1) that has passed as an epoch begins, by default the present one.

    Raises:
        TrainingError: nothing bounds the run, so that no part of it can be told.
    """
    return min(1.0, max(_list_bounds(trainer, trainer.current_epoch if epoch is None else epoch)))


def measure_step_progress(trainer: L.Trainer) -> float:
    """Return the part of the run (0 … 1) that has passed, batches of the present epoch included.

    Batches are counted, not optimizer steps, of which manual optimization may take several a batch.

    Raises:
        TrainingError: nothing bounds the run, so that no part of it can be told.
    """
    batches = trainer.num_training_batches
    part = (trainer.fit_loop.batch_idx + 1) / batches if math.isfinite(batches) and batches else 0.0
    return min(1.0, max(_list_bounds(trainer, trainer.current_epoch + part)))


def is_last_epoch(trainer: L.Trainer) -> bool:
    """Tell whether the present epoch is the last one, as far as that is known when it begins.

    Where data has no length, steps tell nothing of epochs: see `ends_within_epoch`.
    """
    if _has_epochs(trainer) and trainer.current_epoch + 1 >= (trainer.max_epochs or 1):
        return True
    batches = trainer.num_training_batches
    if trainer.max_steps <= 0 or not math.isfinite(batches):
        return False
    batches_trained = trainer.fit_loop.total_batch_idx + 1
    # Manual optimization may step several times a batch, accumulation does so less than once.
    steps = trainer.global_step / batches_trained if batches_trained else 1 / trainer.accumulate_grad_batches
    return trainer.global_step + math.ceil(batches * steps) >= trainer.max_steps


def ends_within_epoch(trainer: L.Trainer, part: float) -> bool:
    """Tell whether a part of the run has passed in an epoch whose length is not known.

    What else waits for an epoch to begin would wait in vain: data that never ends has one epoch.
    """
    return not math.isfinite(trainer.num_training_batches) and measure_step_progress(trainer) >= part


def may_be_validated_later(trainer: L.Trainer, epoch: int) -> bool:
    """Tell whether an epoch has no validation, but later ones may have."""
    every = trainer.check_val_every_n_epoch
    return trainer.enable_validation and (every is None or (epoch + 1) % every > 0)


def continues(trainer: L.Trainer) -> bool:
    """Tell whether a fit goes on with what has been trained: from a checkpoint, or by the same trainer."""
    return trainer.ckpt_path is not None or trainer.global_step > 0


def _has_epochs(trainer: L.Trainer) -> bool:
    return trainer.max_epochs is not None and trainer.max_epochs > 0


def _list_bounds(trainer: L.Trainer, epochs: float) -> list[float]:
    """List the part of each bound of the run that `epochs` of it have used up."""
    parts = []
    if _has_epochs(trainer):
        parts.append(epochs / (trainer.max_epochs or 1))
    if trainer.max_steps > 0:
        parts.append(trainer.global_step / trainer.max_steps)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if is_kind(callback, Timer) and callback._duration is not None:
            # Each process has its own clock, and all have to decide alike.
            parts.append(trainer.strategy.broadcast(callback.time_elapsed() / callback._duration))
    if not parts:
        raise TrainingError(
            "the run has no end, so that no part of it can be told: set max_epochs or max_steps"
        )
    return parts
