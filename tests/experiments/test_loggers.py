"""Where a run is logged: after each start under the same name."""

from pathlib import Path

import lightning as L
import pytest

from elastic.experiments.tools.loggers import LoggerMark, make_loggers
from elastic.experiments.train import train
from tests.runs import TINY, configure, without_account


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_account(monkeypatch, tmp_path)


def test_a_run_goes_on_under_the_name_that_its_checkpoint_has(tmp_path: Path) -> None:
    named = configure(tmp_path, "logger=[csv,wandb]", "+logger.wandb.id=abc")
    mark = LoggerMark(named)
    trainer = L.Trainer(accelerator="cpu", logger=make_loggers(named), enable_progress_bar=False)
    mark.setup(trainer, L.LightningModule(), "fit")
    assert mark.state_dict() == {"wandb": "abc"}, "CSV has a folder for each start"

    cfg = configure(tmp_path, "logger=[csv,wandb]")
    assert [logger.version for logger in make_loggers(cfg, mark.state_dict())] == [0, "abc"]
    assert make_loggers(cfg)[1].version is None
    other = configure(tmp_path, "logger=[csv,wandb]", "+logger.wandb.id=other")
    assert make_loggers(other, mark.state_dict())[1].version == "other"


@pytest.mark.parametrize("loggers", ["[csv,wandb]", "wandb"])
def test_a_run_that_is_only_tried_has_no_name(tmp_path: Path, loggers: str) -> None:
    """Lightning has put a logger of its own in the place of all."""
    cfg = configure(tmp_path, f"logger={loggers}")
    mark, trainer = LoggerMark(cfg), L.Trainer(accelerator="cpu", fast_dev_run=True, logger=make_loggers(cfg))
    mark.setup(trainer, L.LightningModule(), "fit")
    assert mark.state_dict() == {}


@pytest.mark.slow
def test_each_start_of_a_run_is_the_same_run_of_w_and_b(tmp_path: Path) -> None:
    cfg = configure(tmp_path, *TINY, "experiment=smoke", "logger=wandb", "lr_scheduler=constant")
    for epochs in (1, 2):
        cfg.trainer.max_epochs = epochs
        train(cfg, tmp_path)
    first, second = (path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*"))
    assert first == second
