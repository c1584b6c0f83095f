"""Torch's learning rate schedulers, through growth and a restart: their rates are those of plain torch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim import lr_scheduler as lrs

from elastic import Growth, Periodic
from elastic.callbacks import GrowOnSaturation
from elastic.training.module import ElasticClassifier
from tests.programs import BATCH, IMAGES, Killed, Spy, fit, kill_at, make_network

EPOCHS, PER_EPOCH, GROWTH, LR = 5, IMAGES // BATCH, 2, 0.02
STEPS = EPOCHS * PER_EPOCH

Make = Callable[..., Any]  # optimizer -> scheduler
Rates = dict[int, list[tuple[float, float]]]  # by step, of each group: learning rate, momentum

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def make_sequential(optimizer: Any) -> Any:
    rise = lrs.LinearLR(optimizer, start_factor=0.1, total_iters=2)
    return lrs.SequentialLR(optimizer, [rise, lrs.CosineAnnealingLR(optimizer, T_max=3)], milestones=[2])


def make_chained(optimizer: Any) -> Any:
    constant = lrs.ConstantLR(optimizer, factor=0.3, total_iters=3)
    return lrs.ChainedScheduler([constant, lrs.ExponentialLR(optimizer, gamma=0.9)])


# With the lengths that plain torch has to be told, and the module tells them itself.
BY_BATCH: dict[str, tuple[Make, dict[str, int]]] = {
    "LinearLR": (partial(lrs.LinearLR, start_factor=0.2), {"total_iters": STEPS}),
    "CosineAnnealingLR": (partial(lrs.CosineAnnealingLR), {"T_max": STEPS}),
    "PolynomialLR": (partial(lrs.PolynomialLR, power=2), {"total_iters": STEPS}),
    "OneCycleLR": (partial(lrs.OneCycleLR, max_lr=LR), {"total_steps": STEPS}),
    "CyclicLR": (partial(lrs.CyclicLR, base_lr=LR / 4, max_lr=LR, step_size_up=4), {}),
}
BY_EPOCH: dict[str, Make] = {
    "StepLR": partial(lrs.StepLR, step_size=2, gamma=0.5),
    "MultiStepLR": partial(lrs.MultiStepLR, milestones=[1, 3, 4], gamma=0.5),
    "ConstantLR": partial(lrs.ConstantLR, factor=0.3, total_iters=3),
    "LinearLR over a few": partial(lrs.LinearLR, start_factor=0.2, total_iters=4),
    "ExponentialLR": partial(lrs.ExponentialLR, gamma=0.9),
    "CosineAnnealingWarmRestarts": partial(lrs.CosineAnnealingWarmRestarts, T_0=2, eta_min=1e-3),
    "LambdaLR": partial(lrs.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "MultiplicativeLR": partial(lrs.MultiplicativeLR, lr_lambda=lambda step: 1 - 1 / (2 + step)),
    "SequentialLR": make_sequential,
    "ChainedScheduler": make_chained,
}
NESTED = ("SequentialLR", "ChainedScheduler")


def read_groups(optimizer: Any) -> list[tuple[float, float]]:
    return [(group["lr"], group["momentum"]) for group in optimizer.param_groups]


def compute_expected(make: Make, after_step: Callable[[Any, int], None], steps: int = STEPS) -> Rates:
    """Run an optimizer and a scheduler without a network."""
    parameters = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = SGD(parameters, lr=LR, momentum=0.9, nesterov=True)
    scheduler, rates = make(optimizer), {}
    for step in range(steps):
        rates[step] = read_groups(optimizer)
        optimizer.step()
        after_step(scheduler, step)
    return rates


def run(
    folder: Path,
    make: Make,
    rates: Rates,
    *around: L.Callback,
    checkpoint: str | None = None,
    epochs: int = EPOCHS,
) -> ElasticClassifier:
    """Fit a network that grows, and note the rates of its steps."""

    def start(trainer: Any, module: Any) -> None:
        note = lambda optimizer, *_: rates.update({trainer.global_step: read_groups(optimizer)})  # noqa: E731
        trainer.optimizers[0].register_step_pre_hook(note)

    torch.manual_seed(0)
    optimizer = partial(SGD, lr=LR, momentum=0.9, nesterov=True)
    module = ElasticClassifier(make_network(), (1, 8, 8), 4, optimizer, make)
    growth = GrowOnSaturation(Periodic(GROWTH), Growth(factor=1.5, ceiling=2), until=0.5)
    callbacks = [growth, Spy(on_train_start=start), *around]
    fit(module, callbacks, folder, checkpoint, at_epoch_end=True, max_epochs=epochs)
    return module


def run_killed_and_resumed(folder: Path, make: Make, *around: L.Callback) -> Rates:
    """Kill a run in the epoch after it grew, and continue it. Its fresh channels have to learn."""
    rates: Rates = {}
    kernels: list[Tensor] = []

    def note(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == GROWTH:
            kernels.append(module.net[3].weight.detach().clone())

    spy = Spy(on_train_epoch_start=note, on_train_epoch_end=note)
    with pytest.raises(Killed):
        run(folder, make, rates, spy, *around, kill_at((GROWTH + 1) * PER_EPOCH + 2))
    before = dict(rates)
    module = run(folder, make, rates, *around, checkpoint=str(folder / "last.ckpt"))

    events = module.structure.timeline
    grown = {event["width"]: event for event in events}
    assert {event["epoch"] for event in events} == {GROWTH}
    reads = slice(grown["0"]["before"], grown["0"]["after"])
    writes = slice(grown["3"]["before"], grown["3"]["after"])
    moved = (kernels[1] - kernels[0]).abs().amax((2, 3))
    assert moved[writes].all() and moved[:, reads].all() and moved[writes, reads].numel()
    assert len(before) == (GROWTH + 1) * PER_EPOCH + 1
    assert all(rates[step] == before[step] for step in before)
    return rates


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name", [*BY_BATCH, *(n if n in NESTED else pytest.param(n, marks=pytest.mark.slow) for n in BY_EPOCH)]
)
def test_growth_and_a_restart_leave_the_rates_as_they_are(tmp_path: Path, name: str) -> None:
    def follow(scheduler: Any, step: int) -> None:
        by_batch, is_last = name in BY_BATCH, step + 1 == STEPS
        if not is_last and (by_batch or (step + 1) % PER_EPOCH == 0):
            scheduler.step()

    make, told = BY_BATCH[name] if name in BY_BATCH else (BY_EPOCH[name], {})
    expected = compute_expected(partial(make, **told), follow)
    assert run_killed_and_resumed(tmp_path, make) == expected
    assert len({rate for groups in expected.values() for rate, _ in groups}) > 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", BY_BATCH)
def test_a_run_that_goes_on_for_longer_has_the_rates_of_a_longer_schedule(tmp_path: Path, name: str) -> None:
    """From where it is: the steps that it has done are not done again."""
    make, told = BY_BATCH[name]
    longer = 2 * STEPS
    plan = {key: longer for key in told}
    expected = compute_expected(
        partial(make, **plan), lambda scheduler, step: step + 1 < longer and scheduler.step(), longer
    )
    run(tmp_path, make, {})
    rates: Rates = {}
    run(tmp_path, make, rates, checkpoint=str(tmp_path / "last.ckpt"), epochs=2 * EPOCHS)
    assert list(rates) == list(range(STEPS, longer))
    for step, groups in rates.items():
        for ours, theirs in zip(groups, expected[step], strict=True):
            assert ours == pytest.approx(theirs)


def test_rates_that_follow_the_validation_loss_do_so_through_growth_and_a_restart(tmp_path: Path) -> None:
    """Lowered after each epoch whose loss is not far below the best, before and after the growth."""
    losses: dict[int, float] = {}

    def note(trainer: Any, module: Any) -> None:
        losses[trainer.current_epoch] = float(trainer.callback_metrics["val/loss"])

    make = partial(lrs.ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.6)
    rates = run_killed_and_resumed(tmp_path, make, Spy(on_validation_end=note))

    def follow(scheduler: Any, step: int) -> None:
        if (step + 1) % PER_EPOCH == 0:
            scheduler.step(losses[step // PER_EPOCH])

    assert rates == compute_expected(make, follow)
    lowered = [rates[step] != rates[step - 1] for step in range(PER_EPOCH, STEPS, PER_EPOCH)]
    assert any(lowered[:GROWTH]) and any(lowered[GROWTH:])
