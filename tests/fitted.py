"""Runs whose parts a test can hold: the module, the data, the trainer and the callbacks by name."""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor

from elastic.data import ImageData
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.parts import make_callbacks
from elastic.experiments.train import build, make_trainer
from elastic.training.module import ElasticClassifier
from tests.runs import TINY, configure

EXACT = (*TINY, "experiment=smoke", "trainer.precision=32-true", "~data.augment")  # the same in every pass


class Spy(L.Callback):
    """Calls functions by the name of the hook: `Spy(on_train_epoch_end=lambda trainer, module: …)`."""

    def __init__(self, **hooks: Any) -> None:
        vars(self).update(hooks)


class Script(L.Callback):
    """Logs a value of its own choice every epoch, as if it were measured: `fake`."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("fake", self.values[min(trainer.current_epoch, len(self.values) - 1)])


@dataclass
class Run:
    """A run that is ready to be fitted."""

    module: ElasticClassifier
    data: ImageData
    trainer: L.Trainer
    callbacks: dict[str, Any]
    folder: Path

    def fit(self, **options: Any) -> "Run":
        self.trainer.fit(self.module, self.data, **options)
        return self


def prepare(
    folder: Path, *overrides: str, before: tuple[L.Callback, ...] = (), after: tuple[L.Callback, ...] = ()
) -> Run:
    """What `experiments.train.train` would fit, with callbacks of the test around the run's own."""
    silence()
    cfg = configure(folder, *overrides)
    own = make_callbacks(cfg)
    module, data = build(cfg)
    trainer = make_trainer(cfg, [*before, *own.values(), *after], folder)
    return Run(module, data, trainer, own, folder)


def fit(folder: Path, *overrides: str, **around: tuple[L.Callback, ...]) -> Run:
    return prepare(folder, *overrides, **around).fit()


def batch(data: ImageData) -> tuple[Tensor, Tensor]:
    """64 training images as validation sees them."""
    return data.sample(64, seed=1)


@torch.no_grad()
def outputs(module: ElasticClassifier, x_BCHW: Tensor) -> Tensor:
    """The network's logits in evaluation mode; the network itself is left alone."""
    return copy.deepcopy(module.net).eval()(x_BCHW)


def command(
    main: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str,
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of an entry point, run in this process as from a command line."""
    GlobalHydra.instance().clear()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [main.__module__, *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "")  # and what `run` sets is forgotten afterwards
        capsys.readouterr()
        code = 0
        try:
            run(main)
        except SystemExit as left:
            code = int(left.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
