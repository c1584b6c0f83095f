"""End runs at any moment, and compare what continues them with runs that were never ended."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig

import elastic.experiments.train
from elastic.experiments.train import train
from tests.programs import Killed
from tests.runs import TINY, load

CHANGING = (
    *TINY,
    "trainer.max_epochs=6",
    "trigger=periodic",
    "trigger.every=2",
    "callbacks.growth.amount.factor=1.3",
    "callbacks.growth.until=0.9",
    "callbacks.gates.penalty=1",
    "data.batch_size=128",
    "callbacks.gates.grain=kernel",
    "callbacks.gates.begin=0.0",
    "callbacks.gates.budget=null",
    "callbacks.gates.grace=1",
    "optimizer.lr=0.1",
)


class Kill(L.Callback):
    """End the run in a given epoch, before or in the middle of it."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == self.batch:
            raise Killed


def kill(cfg: DictConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, batch: int) -> None:
    """Carry out a run until it is killed."""
    make_callbacks = elastic.experiments.train.make_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(
            elastic.experiments.train,
            "make_callbacks",
            lambda cfg: make_callbacks(cfg) | {"kill": Kill(epoch, batch)},
        )
        with pytest.raises(Killed):
            train(cfg, folder)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Compare to the last bit, whatever the nesting."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, where
        assert one.stride() == other.stride() and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


def assert_same_run(whole: Path, broken: Path) -> None:
    """Compare two runs to the last bit: weights, optimizer, schedules, callbacks and files."""
    for name in ("timeline.jsonl", "model.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    one, two = (load(folder / "last.ckpt") for folder in (whole, broken))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "elastic", "epoch", "global_step"):
        assert_same(one[key], two[key], key)
    for checkpoint in (one, two):
        checkpoint["callbacks"]["Census"].pop("seconds")  # how long it took may differ
    assert_same(*({k: v for k, v in c["callbacks"].items() if "Checkpoint" not in k} for c in (one, two)))
