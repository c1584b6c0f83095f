"""How long a schedule lasts, and when it is stepped."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from elastic.errors import TrainingError
from elastic.training.schedules import make_schedule


def make(scheduler: Any, steps: int = 40, batches: int = 8) -> Any:
    """Make a schedule of a run of so many steps, in epochs of so many batches."""
    return make_schedule(scheduler, SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9), steps, batches)


@pytest.mark.parametrize(
    ("scheduler", "length"),
    [
        (partial(lr_scheduler.OneCycleLR, max_lr=0.1), "total_steps"),
        (lr_scheduler.CosineAnnealingLR, "T_max"),
        (lr_scheduler.PolynomialLR, "total_iters"),
        (lr_scheduler.LinearLR, "total_iters"),
    ],
)
def test_a_scheduler_is_told_the_steps_where_it_asks_and_stepped_by_batch(
    scheduler: Any, length: str
) -> None:
    made = make(scheduler)
    assert getattr(made["scheduler"], length) == 40
    assert (made["interval"], made["frequency"]) == ("step", 1)


def test_a_scheduler_keeps_the_length_it_was_given() -> None:
    """A warm-up of 5 epochs is one of 5 epochs."""
    made = make(partial(lr_scheduler.LinearLR, total_iters=5))
    assert made["scheduler"].total_iters == 5 and made["frequency"] == 8


@pytest.mark.parametrize(
    ("scheduler", "frequency"),
    [
        (partial(lr_scheduler.StepLR, step_size=7), 8),
        (partial(lr_scheduler.MultiStepLR, milestones=[3, 5]), 8),
        (lr_scheduler.ReduceLROnPlateau, 8),
        (partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=1.0), 1),
        (partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9), 1),
    ],
)
def test_one_that_asks_for_no_length_is_stepped_by_epoch_unless_it_is_cyclical(
    scheduler: Any, frequency: int
) -> None:
    made = make(scheduler)
    assert (made["interval"], made["frequency"]) == ("step", frequency)
    assert made["monitor"] == "val/loss"


def test_too_few_steps_to_rise_and_fall_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"cannot be spread over 3 steps: raise trainer\.max_epochs"):
        make(partial(lr_scheduler.OneCycleLR, max_lr=0.1, pct_start=1 / 3), steps=3)
