"""What elasticity costs in a training step: operator calls, and values that are read back from the device."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.callbacks import Distil, PruneByGates
from elastic.models import resnet20
from elastic.training.module import ElasticClassifier, ElasticModule
from elastic.training.tasks import Classification
from tests.programs import Program, Spy, fit

# Operators that wait for a value. (On a CPU, torch's Adam reads its counts of steps, which are there.)
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")
MOST = 1.3


class Calls(TorchDispatchMode):
    """Count the operators that are called between the start of a batch and its end."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.steps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    def count_mean(self, names: Sequence[str] | None = None) -> float:
        """Return the mean of a step, of all operators or of some."""
        return sum(self.counts[name] for name in names or self.counts) / self.steps


def count_calls(module: L.LightningModule, *callbacks: L.Callback) -> Calls:
    """Count over ten steps, so that what happens every ten has its share; the first images are looked at."""
    calls = Calls()

    def enter(trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= 2:
            calls.__enter__()

    def leave(trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > 2:
            calls.__exit__(None, None, None)
            calls.steps += 1

    around = [Spy(on_train_batch_start=enter), *callbacks, Spy(on_train_batch_end=leave)]
    fit(module, around, max_epochs=6, limit_train_batches=2, limit_val_batches=0)
    return calls


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return resnet20(2, 1, 4)


@pytest.fixture(scope="module")
def plain() -> Calls:
    return count_calls(Program(make_net()))


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 800},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"budget": 30_000, "by": "macs"}, marks=pytest.mark.slow),
        pytest.param({"budget": 800, "grain": "kernel"}, marks=pytest.mark.slow),
    ],
    ids=["budget", "penalty", "macs", "kernels"],
)
def test_a_gated_step_calls_few_more_operators_and_reads_nothing_back(
    plain: Calls, options: dict[str, Any]
) -> None:
    gated = count_calls(Program(make_net()), PruneByGates(begin=0.0, end=1.0, **options))
    assert gated.count_mean() <= MOST * plain.count_mean()
    assert gated.count_mean(READS) == plain.count_mean(READS)


@pytest.mark.slow
def test_the_shipped_module_reads_nothing_back_and_calls_no_more_than_a_users_own(plain: Calls) -> None:
    module = ElasticClassifier(make_net(), (1, 8, 8), 4, partial(torch.optim.AdamW, lr=1e-2))
    calls = count_calls(module)
    assert calls.count_mean() <= 1.02 * plain.count_mean()
    assert calls.count_mean(READS) == plain.count_mean(READS)


def test_mixed_images_and_a_teacher_are_read_back_nowhere(plain: Calls) -> None:
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    module = ElasticModule(make_net(), (1, 8, 8), Classification(4, mixup=0.5), optimizer)
    calls = count_calls(module, Distil(make_net()))
    assert calls.count_mean(READS) == plain.count_mean(READS)
