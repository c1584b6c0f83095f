"""Torch's learning rate schedulers, through growth and a restart: their rates are those of plain torch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim import lr_scheduler as lrs

from tests.fitted import EXACT, Run, Spy, prepare
from tests.programs import Killed
from tests.resuming import Kill

EPOCHS, PER_EPOCH, GROWTH, LR = 5, 3, 2, 0.02
STEPS = EPOCHS * PER_EPOCH
GROWING = (
    *EXACT,
    *("schedule=[growth]", "data.batch_size=400", f"trainer.max_epochs={EPOCHS}"),
    *("trigger=periodic", f"trigger.every={GROWTH}", "callbacks.growth.until=0.5"),
    *("optimizer=sgd", "lr_scheduler=constant"),
    *(f"optimizer.lr={LR}", "optimizer.weight_decay=0"),
)

Make = Callable[..., Any]  # optimizer -> scheduler
Rates = dict[int, list[tuple[float, float]]]  # by step, of each group: learning rate, momentum


def sequential(optimizer: Any) -> Any:
    rise = lrs.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    return lrs.SequentialLR(optimizer, [rise, lrs.CosineAnnealingLR(optimizer, T_max=10)], milestones=[5])


def chained(optimizer: Any) -> Any:
    constant = lrs.ConstantLR(optimizer, factor=0.3, total_iters=7)
    return lrs.ChainedScheduler([constant, lrs.ExponentialLR(optimizer, gamma=0.9)])


# With the lengths that plain torch has to be told, and the module tells them itself.
SCHEDULERS: dict[str, tuple[Make, dict[str, int]]] = {
    "StepLR": (partial(lrs.StepLR, step_size=4, gamma=0.5), {}),
    "MultiStepLR": (partial(lrs.MultiStepLR, milestones=[2, 6, 7, 11], gamma=0.5), {}),
    "ConstantLR": (partial(lrs.ConstantLR, factor=0.3, total_iters=7), {}),
    "LinearLR": (partial(lrs.LinearLR, start_factor=0.2), {"total_iters": STEPS}),
    "ExponentialLR": (partial(lrs.ExponentialLR, gamma=0.9), {}),
    "CosineAnnealingLR": (partial(lrs.CosineAnnealingLR), {"T_max": STEPS}),
    "PolynomialLR": (partial(lrs.PolynomialLR, power=2), {"total_iters": STEPS}),
    "OneCycleLR": (partial(lrs.OneCycleLR, max_lr=LR), {"total_steps": STEPS}),
    "CyclicLR": (partial(lrs.CyclicLR, base_lr=LR / 4, max_lr=LR, step_size_up=4), {}),
    "CosineAnnealingWarmRestarts": (partial(lrs.CosineAnnealingWarmRestarts, T_0=4, eta_min=1e-3), {}),
    "LambdaLR": (partial(lrs.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)), {}),
    "MultiplicativeLR": (partial(lrs.MultiplicativeLR, lr_lambda=lambda step: 1 - 1 / (2 + step)), {}),
    "SequentialLR": (sequential, {}),
    "ChainedScheduler": (chained, {}),
}


def state(optimizer: Any) -> list[tuple[float, float]]:
    return [(group["lr"], group["momentum"]) for group in optimizer.param_groups]


def plain(make: Make, after_step: Callable[[Any, int], None]) -> Rates:
    """Of an optimizer and a scheduler without a network."""
    parameters = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = SGD(parameters, lr=LR, momentum=0.9, nesterov=True)
    scheduler, rates = make(optimizer), {}
    for step in range(STEPS):
        rates[step] = state(optimizer)
        optimizer.step()
        after_step(scheduler, step)
    return rates


def growing(folder: Path, make: Make, rates: Rates, *around: Any) -> Run:
    """A run that notes the rates of its steps."""

    def start(trainer: Any, module: Any) -> None:
        note = lambda optimizer, *_: rates.update({trainer.global_step: state(optimizer)})  # noqa: E731
        trainer.optimizers[0].register_step_pre_hook(note)

    run = prepare(folder, *GROWING, after=(Spy(on_train_start=start), *around))
    run.module.make_scheduler = make
    return run


def killed_and_resumed(folder: Path, make: Make, *around: Any) -> Rates:
    """Of a run that grows, is killed in the epoch after, and continued. Its fresh channels have to learn."""
    rates: Rates = {}
    kernels: list[Tensor] = []

    def note(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == GROWTH:
            kernels.append(module.net[3].weight.detach().clone())

    spy = Spy(on_train_epoch_start=note, on_train_epoch_end=note)
    with pytest.raises(Killed):
        growing(folder, make, rates, spy, *around, Kill(GROWTH + 1, 1)).fit()
    seen = dict(rates)
    run = growing(folder, make, rates, *around).fit(ckpt_path=folder / "last.ckpt")

    grown = {event["width"]: event for event in run.module.structure.timeline}
    assert {event["epoch"] for event in run.module.structure.timeline} == {GROWTH}
    writes, reads = (slice(grown[name]["before"], grown[name]["after"]) for name in ("3", "0"))
    moved = (kernels[1] - kernels[0]).abs().amax((2, 3))
    assert moved[writes].all() and moved[:, reads].all() and moved[writes, reads].numel()
    assert len(seen) == (GROWTH + 1) * PER_EPOCH + 1 and all(rates[step] == seen[step] for step in seen)
    return rates


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_growth_and_a_restart_leave_the_rates_as_they_are(tmp_path: Path, name: str) -> None:
    make, told = SCHEDULERS[name]
    rates = killed_and_resumed(tmp_path, make)
    expected = plain(partial(make, **told), lambda scheduler, step: step + 1 < STEPS and scheduler.step())
    assert rates == expected
    assert len({rate for groups in expected.values() for rate, _ in groups}) > 1


def test_rates_that_follow_the_validation_loss_do_so_through_growth_and_a_restart(tmp_path: Path) -> None:
    """Lowered after each epoch whose loss is not a third below the best, before and after the growth."""
    losses: dict[int, float] = {}

    def note(trainer: Any, module: Any) -> None:
        losses[trainer.current_epoch] = float(trainer.callback_metrics["val/loss"])

    make = partial(lrs.ReduceLROnPlateau, factor=0.5, patience=0, threshold=1 / 3)
    rates = killed_and_resumed(tmp_path, make, Spy(on_validation_end=note))

    def follow(scheduler: Any, step: int) -> None:
        if (step + 1) % PER_EPOCH == 0:
            scheduler.step(losses[step // PER_EPOCH])

    assert rates == plain(make, follow)
    lowered = [rates[step] != rates[step - 1] for step in range(PER_EPOCH, STEPS, PER_EPOCH)]
    assert any(lowered[:GROWTH]) and any(lowered[GROWTH:])
