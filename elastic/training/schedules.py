"""Fit a learning rate schedule of torch's to a run."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from elastic.errors import OptionError, TrainingError
from elastic.ranges import Part, checked

Scheduler = LRScheduler | ReduceLROnPlateau

BY_BATCH = (OneCycleLR, CyclicLR)  # by torch's own documentation
# What torch's schedulers call the number of steps they are to last.
LENGTH = ("total_steps", "T_max", "total_iters")


@checked
class StableDecay(LRScheduler):
    """Raise the learning rate to the optimizer's, keep it, and bring it down to zero along a line.

    Args:
        total_steps: of the run.
        warm: the part of the run in which it rises.
        decay: the part of the run after which it goes down; a network that grows should have grown by then.

    Raises:
        OptionError: it would go down before it is up.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        warm: Part = 0.05,
        decay: Part = 0.5,
        last_epoch: int = -1,
    ) -> None:
        if not warm <= decay < 1:
            raise OptionError(f"warm is {warm}, decay {decay}: set lr_scheduler.warm ≤ decay < 1")
        self.total_steps, self.warm, self.decay = total_steps, warm, decay
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group."""
        part = min(1.0, self.last_epoch / self.total_steps)
        rise = (self.last_epoch + 1) / (self.warm * self.total_steps + 1)  # never from zero, a step lost
        factor = min(1.0, rise, (1 - part) / (1 - self.decay))
        return [rate * factor for rate in self.base_lrs]


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
    parameters = inspect.signature(make_scheduler).parameters
    keywords: Mapping[str, Any] = getattr(make_scheduler, "keywords", {})
    lengths = [name for name in LENGTH if name in parameters and name not in keywords]
    if lengths and not math.isfinite(steps):
        raise TrainingError(
            "this schedule lasts as long as the run, whose end is not known: set trainer.max_epochs or "
            "trainer.max_steps, where the data has no length trainer.limit_train_batches, or "
            "lr_scheduler=constant"
        )
    if not lengths and not math.isfinite(batches):
        raise TrainingError(
            "this schedule takes a step an epoch, whose length is not known: set "
            "trainer.limit_train_batches, or lr_scheduler=cosine, which takes one a batch"
        )
    plan = {name: round(steps) for name in lengths}
    try:
        scheduler = make_scheduler(optimizer, **plan)
    except ZeroDivisionError as error:  # OneCycleLR, where its warm-up is of one step
        raise TrainingError(
            f"the scheduler cannot be spread over {steps:.0f} steps: raise trainer.max_epochs or "
            "trainer.max_steps, lower data.batch_size, or set lr_scheduler=constant"
        ) from error
    by_batch = bool(plan) or isinstance(scheduler, BY_BATCH)
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
