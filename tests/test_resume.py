"""A run killed at any moment and continued is the run that was never killed, bit for bit."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig

import elastic.experiments.train
from elastic.experiments.train import train
from tests.runs import TINY, configure, load

CHANGING = (
    *TINY,
    "trainer.max_epochs=8",
    "trigger=periodic",
    "trigger.every=2",
    "callbacks.growth.amount.factor=1.3",
    "callbacks.growth.until=0.9",
    "callbacks.gates.penalty=3e-1",
    "data.batch_size=64",
    "callbacks.gates.grain=kernel",
    "callbacks.gates.begin=0.0",
    "callbacks.gates.budget=null",
    "callbacks.gates.grace=1",
    "optimizer.lr=3e-2",
)


class Killed(Exception):
    pass


class Kill(L.Callback):
    """Stops the run dead in a given epoch, before or in the middle of it."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == self.batch:
            raise Killed


def killed(cfg: DictConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, batch: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            elastic.experiments.train,
            "instantiate",
            lambda *a, _real=elastic.experiments.train.instantiate, **k: _real(
                *a, **(k | {"callbacks": [*k["callbacks"], Kill(epoch, batch)]} if "callbacks" in k else k)
            ),
        )
        with pytest.raises(Killed):
            train(cfg, folder)


def same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride(), where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def same_run(whole: Path, broken: Path) -> None:
    """Two runs have come to the same, to the last bit: weights, optimizer, schedules, callbacks and files."""
    for name in ("timeline.jsonl", "model.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    one, two = (load(folder / "last.ckpt") for folder in (whole, broken))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "elastic", "epoch", "global_step"):
        same(one[key], two[key], key)
    for checkpoint in (one, two):
        checkpoint["callbacks"]["Census"].pop("seconds")  # how long it took may differ
    same(*({k: v for k, v in c["callbacks"].items() if "Checkpoint" not in k} for c in (one, two)))


DEEPER = ("model=resnet20", "model.width=2", "callbacks.growth.amount.blocks=2")


@pytest.mark.parametrize(
    "options",
    [
        ("trainer.precision=32-true", "optimizer=adamw"),
        ("trainer.precision=bf16-mixed", "optimizer=adamw"),
        ("trainer.precision=32-true", "optimizer=sgd"),
        ("trainer.precision=bf16-mixed", "optimizer=sgd"),
        ("trainer.precision=32-true", "callbacks.gates.grain=channel", *DEEPER),
    ],
)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    changing = (*CHANGING, *options)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(configure(whole, *changing), whole)
    for epoch, batch in ((2, 3), (5, 0)):
        killed(configure(broken, *changing), broken, monkeypatch, epoch, batch)
    train(configure(broken, *changing), broken)

    events = [json.loads(line) for line in (whole / "timeline.jsonl").read_text().splitlines()]
    grown = {e["epoch"] for e in events if e["why"].startswith("grow")}
    assert min(grown) <= 2 and max(grown) >= 5, "growth before and after the kills"
    assert any(e["why"].startswith("prune") for e in events)
    assert sum("stage" in e for e in events) == (6 if DEEPER[0] in options else 0)
    same_run(whole, broken)
