"""How long a schedule lasts, and when it is stepped."""

from functools import partial
from math import inf
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from elastic.errors import OptionError, TrainingError
from elastic.training.schedules import StableDecay, make_schedule, read_plan, replan


def make(scheduler: Any, steps: float = 40, batches: float = 8) -> Any:
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


@pytest.mark.parametrize(
    ("scheduler", "steps", "batches", "remedy"),
    [
        (partial(lr_scheduler.OneCycleLR, max_lr=0.1), inf, 8, r"end is not known: .* or trainer\.max_steps"),
        (partial(lr_scheduler.StepLR, step_size=7), 40, inf, r"length is not known: .*limit_train_batches"),
    ],
)
def test_what_a_schedule_has_to_know_is_named(
    scheduler: Any, steps: float, batches: float, remedy: str
) -> None:
    with pytest.raises(TrainingError, match=remedy):
        make(scheduler, steps, batches)


def list_rates(scheduler: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def test_a_stable_rate_rises_stays_and_goes_down_to_nothing() -> None:
    rates = list_rates(make(partial(StableDecay, warm=0.1, decay=0.5))["scheduler"], 41)
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert set(rates[4:21]) == {0.1}
    assert rates[20:] == pytest.approx([0.1 * (40 - step) / 20 for step in range(20, 41)])
    assert list_rates(make(partial(StableDecay, warm=0, decay=0))["scheduler"], 2) == pytest.approx(
        [0.1, 0.0975]
    )


def test_a_stable_rate_of_a_longer_run_goes_on_where_it_is() -> None:
    scheduler = make(StableDecay, steps=40)["scheduler"]
    list_rates(scheduler, 30)
    longer = replan(StableDecay, scheduler, {"total_steps": 80})
    assert read_plan(longer) == {"total_steps": 80}
    assert list_rates(longer, 50) == list_rates(make(StableDecay, steps=80)["scheduler"], 80)[30:]


def test_a_rate_that_goes_down_before_it_is_up_is_refused() -> None:
    with pytest.raises(OptionError, match=r"lr_scheduler\.warm ≤ decay"):
        make(partial(StableDecay, warm=0.6, decay=0.5))
