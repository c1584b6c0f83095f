"""Programs that import Lightning as `pytorch_lightning` are trained as those of `lightning.pytorch` are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.utils.data import DataLoader

from elastic import Growth, Plateau
from elastic.callbacks import (
    AverageWeights,
    ElasticProgress,
    GrowOnSaturation,
    PruneByGates,
    PruneDynamically,
    Reconstruct,
    TrainJointly,
)
from elastic.callbacks.panels import log_samples
from elastic.errors import TrainingError
from elastic.experiments.tools.environment import silence
from elastic.training.joining import find_structure
from elastic.training.kinds import is_kind
from elastic.training.structure import Structure
from tests.programs import BATCH, QUIET, Killed, kill_at, make_data, make_network

PACKAGES: list[Any] = [lightning.pytorch, pytorch_lightning]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch"),
]


def make_program(package: Any) -> Any:
    """Make a classifier in a package, which logs a metric as its epochs end."""

    class Classifier(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = make_network()

        def forward(self, x_BCHW: Tensor) -> Any:
            return self.net(x_BCHW)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1])

        def on_train_epoch_end(self) -> None:
            self.log("epochs", float(self.current_epoch))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    torch.manual_seed(3)
    return Classifier()


def train(
    package: Any,
    callbacks: Sequence[Any],
    folder: Path | None = None,
    checkpoint: str | None = None,
    **options: Any,
) -> Any:
    """Train the classifier, and return it."""
    module = make_program(package)
    if folder is not None:
        keep = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        callbacks = [*callbacks, package.callbacks.ModelCheckpoint(folder, "last", **keep)]
        options["enable_checkpointing"] = True
    trainer = package.Trainer(**{**QUIET, "log_every_n_steps": 1, **options}, callbacks=[*callbacks])
    torch.manual_seed(4)
    trainer.fit(module, DataLoader(make_data(), BATCH), ckpt_path=checkpoint)
    return module


def grow() -> GrowOnSaturation:
    trigger = Plateau(patience=1, min_gain=100)
    return GrowOnSaturation(trigger, Growth(factor=1.5, ceiling=2), monitor="epochs", until=0.9)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "make",
    [
        lambda: [grow(), PruneByGates(grain="channel", penalty=1e-2), AverageWeights(decay=0.9)],
        lambda: [TrainJointly([0.5])],
        lambda: [Reconstruct([0.5], dense=0.34, prune=0.33)],
        lambda: [PruneDynamically(gain=0.5)],
    ],
    ids=["growth", "joint", "reconstruct", "dynamic"],
)
def test_both_train_the_same_network(make: Callable[[], list[Any]]) -> None:
    one, other = (train(package, make(), max_epochs=4) for package in PACKAGES)
    structures = [cast(Structure, find_structure(module)) for module in (one, other)]
    assert structures[0].timeline == structures[1].timeline
    torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()), rtol=0, atol=0)


def test_an_epoch_that_has_ended_ends_once(tmp_path: Path) -> None:
    steps = {"max_epochs": -1, "max_steps": 24}

    def make() -> list[Any]:
        return [grow(), PruneByGates(grain="channel", penalty=1e-2)]

    whole = train(pytorch_lightning, make(), tmp_path / "whole", **steps)
    with pytest.raises(Killed):
        train(pytorch_lightning, [*make(), kill_at(13)], tmp_path / "parts", **steps)
    again = train(
        pytorch_lightning, make(), tmp_path / "parts", str(tmp_path / "parts" / "last.ckpt"), **steps
    )
    torch.testing.assert_close(dict(whole.named_parameters()), dict(again.named_parameters()), rtol=0, atol=0)


def test_a_timer_tells_how_far_a_run_is() -> None:
    """A run that the clock alone ends has no epochs whose part could be told."""
    timer = pytorch_lightning.callbacks.Timer(duration={"seconds": 1})
    pruning = PruneByGates(budget=250, penalty=1e-2)
    train(pytorch_lightning, [timer, pruning], max_epochs=-1)
    assert timer.time_remaining() <= 0


def test_what_cannot_follow_is_refused_in_both() -> None:
    averaging = pytorch_lightning.callbacks.EMAWeightAveraging()
    with pytest.raises(TrainingError, match="EMAWeightAveraging cannot follow a network that changes"):
        train(pytorch_lightning, [grow(), averaging], max_epochs=2)
    with pytest.raises(TrainingError, match="leave it out, or say `import lightning"):
        train(pytorch_lightning, [ElasticProgress()], max_epochs=2)


def test_runs_from_the_command_line_are_silent_in_both(caplog: pytest.LogCaptureFixture) -> None:
    """The package that is imported last logs for both."""
    silence()
    lightning.pytorch.Trainer(**QUIET)
    assert not caplog.records


@pytest.mark.parametrize("package", PACKAGES)
def test_panels_go_to_loggers_of_both(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    kind, others = package.loggers.WandbLogger, package.loggers.TensorBoardLogger
    monkeypatch.setattr(kind, "log_image", lambda self, key, *_, **__: logged.append(key))
    logger = object.__new__(kind)  # which would ask for an account
    assert is_kind(logger, WandbLogger) and not is_kind(logger, TensorBoardLogger)
    assert is_kind(object.__new__(others), TensorBoardLogger)
    log_samples(logger, [torch.zeros(3, 8, 8)], ["0"])
    assert logged == ["samples"]
