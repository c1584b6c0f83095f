"""Where a run is logged: after each start under the same name."""

from pathlib import Path

import lightning as L
import pytest
import torch

from elastic.experiments.tools.loggers import LoggerMark, make_loggers, read_ids
from elastic.experiments.train import train
from tests.runs import TINY, configure, without_account


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_account(monkeypatch, tmp_path)


def test_a_run_goes_on_under_the_name_that_its_checkpoint_has(tmp_path: Path) -> None:
    named = configure(tmp_path, "logger=[csv,wandb]", "+logger.wandb.id=abc")
    mark, checkpoint = LoggerMark(named), tmp_path / "last.ckpt"
    trainer = L.Trainer(accelerator="cpu", logger=make_loggers(named), enable_progress_bar=False)
    mark.setup(trainer, L.LightningModule(), "fit")
    assert mark.state_dict() == {"wandb": "abc"}, "CSV has a folder for each start"
    torch.save({"callbacks": {"LoggerMark": mark.state_dict()}}, checkpoint)

    cfg = configure(tmp_path, "logger=[csv,wandb]")
    assert [logger.version for logger in make_loggers(cfg, read_ids(checkpoint))] == [0, "abc"]
    assert make_loggers(cfg, read_ids(None))[1].version is None
    other = configure(tmp_path, "logger=[csv,wandb]", "+logger.wandb.id=other")
    assert make_loggers(other, read_ids(checkpoint))[1].version == "other"


@pytest.mark.slow
def test_each_start_of_a_run_is_the_same_run_of_w_and_b(tmp_path: Path) -> None:
    cfg = configure(tmp_path, *TINY, "experiment=smoke", "logger=wandb", "lr_scheduler=constant")
    for epochs in (1, 2):
        cfg.trainer.max_epochs = epochs
        train(cfg, tmp_path)
    first, second = (path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*"))
    assert first == second
