"""Fit a learning rate schedule of torch's to a run."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from elastic.errors import TrainingError

Scheduler = LRScheduler | ReduceLROnPlateau

BY_BATCH = (OneCycleLR, CyclicLR)  # by torch's own documentation
# What torch's schedulers call the number of steps they are to last.
LENGTH = ("total_steps", "T_max", "total_iters")


def make_schedule(
    make_scheduler: Callable[..., Scheduler], optimizer: torch.optim.Optimizer, steps: int, batches: int
) -> LRSchedulerConfigType:
    """Make a scheduler and say when it is stepped.

    Those that last a number of steps are told it and stepped by batch, cyclical ones too; others by epoch.

    Args:
        steps: of the optimizer, in all.
        batches: of an epoch.

    Raises:
        TrainingError: the scheduler cannot be spread over so few steps.
    """
    known = inspect.signature(make_scheduler).parameters
    keywords: Mapping[str, Any] = getattr(make_scheduler, "keywords", {})
    length = {name: steps for name in LENGTH if name in known and name not in keywords}
    try:
        scheduler = make_scheduler(optimizer, **length)
    except ZeroDivisionError as error:  # OneCycleLR, where its warm-up is of one step
        raise TrainingError(
            f"the scheduler cannot be spread over {steps} steps: raise trainer.max_epochs, lower "
            "data.batch_size or set lr_scheduler=constant"
        ) from error
    by_batch = bool(length) or isinstance(scheduler, BY_BATCH)
    # By the batches of an epoch: by epochs Lightning does it after the checkpoint, which would lose one.
    frequency = 1 if by_batch else batches
    return {"scheduler": scheduler, "interval": "step", "frequency": frequency, "monitor": "val/loss"}
