"""Fit a learning rate schedule of torch's to a run."""

import inspect
import math
import warnings
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
    make_scheduler: Callable[..., Scheduler], optimizer: torch.optim.Optimizer, steps: float, batches: float
) -> LRSchedulerConfigType:
    """Make a scheduler and say when it is stepped.

    Those that last a number of steps are told it and stepped by batch, cyclical ones too; others by epoch.

    Args:
        steps: of the optimizer, in all; infinite where nobody knows.
        batches: of an epoch; likewise.

    Raises:
        TrainingError: the scheduler has to know one that is not known, or cannot be spread over so few steps.
    """
    known = inspect.signature(make_scheduler).parameters
    keywords: Mapping[str, Any] = getattr(make_scheduler, "keywords", {})
    asked = [name for name in LENGTH if name in known and name not in keywords]
    if not math.isfinite(steps if asked else 0) or not math.isfinite(0 if asked else batches):
        raise TrainingError(
            "a schedule lasts as long as the run, whose end is not known: set trainer.max_epochs and, "
            "where the data has no length, trainer.limit_train_batches; or lr_scheduler=constant"
        )
    length = {name: round(steps) for name in asked}
    try:
        scheduler = make_scheduler(optimizer, **length)
    except ZeroDivisionError as error:  # OneCycleLR, where its warm-up is of one step
        raise TrainingError(
            f"the scheduler cannot be spread over {steps} steps: raise trainer.max_epochs, lower "
            "data.batch_size or set lr_scheduler=constant"
        ) from error
    by_batch = bool(length) or isinstance(scheduler, BY_BATCH)
    # By the batches of an epoch: by epochs Lightning does it after the checkpoint, which would lose one.
    frequency = 1 if by_batch else int(batches)
    return {"scheduler": scheduler, "interval": "step", "frequency": frequency, "monitor": "val/loss"}


def read_plan(scheduler: Scheduler) -> dict[str, Any]:
    """Read how long a scheduler is to last, as far as it has been told."""
    return {name: value for name, value in vars(scheduler).items() if name in LENGTH}


def replan(
    make_scheduler: Callable[..., Scheduler], scheduler: LRScheduler, plan: Mapping[str, Any]
) -> Scheduler:
    """Make a scheduler of another length and bring it to where the present one is.

    Args:
        plan: of the new one, see `read_plan`.
    """
    optimizer: torch.optim.Optimizer = scheduler.optimizer
    for group in optimizer.param_groups:  # where it began: most schedulers go on from the last rate
        group["lr"] = group["initial_lr"]
    longer = make_scheduler(optimizer, **plan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        for _ in range(scheduler.last_epoch):
            longer.step()  # type: ignore[call-arg]
    return longer
