"""A run killed at any moment and continued is the run that was never killed, bit for bit."""

import json
from pathlib import Path

import pytest

from elastic.experiments.train import train
from tests.resuming import CHANGING, assert_same_run, kill
from tests.runs import configure

DEEPER = ("model=resnet20", "model._target_=elastic.models.resnet.resnet", "+model.blocks=2")
IN_DEPTH = (
    *DEEPER,
    "model.width=2",
    "data.batch_size=300",
    "callbacks.growth.amount.blocks=1",
    "callbacks.gates.grain=channel",
)


@pytest.mark.parametrize(
    "options",
    [
        ("trainer.precision=32-true", "optimizer=adamw"),
        pytest.param(("trainer.precision=bf16-mixed", "optimizer=adamw"), marks=pytest.mark.slow),
        pytest.param(("trainer.precision=32-true", "optimizer=sgd"), marks=pytest.mark.slow),
        pytest.param(("trainer.precision=bf16-mixed", "optimizer=sgd"), marks=pytest.mark.slow),
        pytest.param(("trainer.precision=32-true", *IN_DEPTH), marks=pytest.mark.slow),
    ],
    ids=["adamw", "adamw-bf16", "sgd", "sgd-bf16", "in depth"],
)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    changing = (*CHANGING, *options)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(configure(whole, *changing), whole)
    for epoch, batch in ((2, 3), (5, 0)):
        kill(configure(broken, *changing), broken, monkeypatch, epoch, batch)
    train(configure(broken, *changing), broken)

    events = [json.loads(line) for line in (whole / "timeline.jsonl").read_text().splitlines()]
    grown = {e["epoch"] for e in events if e["why"].startswith("grow")}
    assert min(grown) <= 2 < max(grown), "growth before and after a kill"
    assert any(e["why"].startswith("prune") for e in events)
    assert sum("stage" in e for e in events) == (3 if DEEPER[0] in options else 0)
    assert_same_run(whole, broken)
