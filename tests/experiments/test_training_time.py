"""The time of a finished run's training, from a few batches of each epoch: it has to be that run's."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from elastic.errors import FileError, OptionError
from elastic.experiments import training_time
from elastic.experiments.train import train
from elastic.experiments.training_time import (
    StepClock,
    TrainingTime,
    count_batches,
    show_training_time,
    time_training,
)
from tests.fitted import EXACT
from tests.runs import configure

SIZES = {"0": 4, "3": 6, "7": 6, "10": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that grew when its validation accuracy did not gain what none can, in epoch 2 of 4."""
    folder = tmp_path_factory.mktemp("runs") / "grown-seed0"
    trigger = ("trigger=plateau", "trigger.min_gain=2", "trigger.patience=1", "callbacks.growth.until=0.6")
    train(configure(folder, *EXACT, "schedule=[growth,gates]", *trigger, "trainer.max_epochs=4"), folder)
    return folder


def test_a_run_is_timed_as_it_grew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the clock, each step takes as many seconds as there are channels."""
    timeline = [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]
    sizes = [{**SIZES, **{e["width"]: e["after"] for e in timeline if e["epoch"] <= n}} for n in range(4)]
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    now = [0.0]

    class Channels(StepClock):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            now[0] += sum(rest[0].structure.widths.sizes().values())
            super().on_train_batch_end(trainer, *rest)

    monkeypatch.setattr(training_time, "StepClock", Channels)
    training = time_training(folder, 2, lambda: now[0])
    channels = [sum(each.values()) for each in sizes]
    assert channels[0] == channels[1] < channels[2] == channels[3], "one growth, in epoch 2"
    assert training.steps_s == channels
    assert training.batches == timeline[0]["step"] / timeline[0]["epoch"]
    assert training.total_s == training.batches * sum(channels)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files


def test_an_epoch_that_was_not_trained_is_not_timed(folder: Path, tmp_path: Path) -> None:
    """Growth comes where it came in the plan of four epochs."""
    ended = Path(shutil.copytree(folder, tmp_path / "ended-seed0"))
    (ended / "SHA256SUMS").unlink()
    summary = json.loads((ended / "summary.json").read_text())
    (ended / "summary.json").write_text(json.dumps(summary | {"epochs": 3}))
    assert len(time_training(ended, 2).steps_s) == 3
    (ended / "summary.json").write_text(json.dumps(summary | {"epochs": 0}))
    with pytest.raises(OptionError, match="has not been trained there"):
        time_training(ended, 2)


@pytest.mark.parametrize(
    ("options", "epochs", "counts"),
    [
        ({}, 3, (20, 20)),
        ({"limit_train_batches": 2, "max_steps": -1}, 3, (2, 2)),
        ({"limit_train_batches": 30}, 3, (20, 20)),
        ({"limit_train_batches": 0.5}, 3, (10, 10)),
        ({"overfit_batches": 3, "limit_train_batches": 0.5}, 3, (3, 3)),
        ({"max_steps": 45}, 3, (20, 5)),
        ({"max_steps": 100}, 3, (20, 20)),
        ({"max_steps": 5}, 1, (20, 5)),
        ({"max_steps": 15, "accumulate_grad_batches": 3}, 3, (20, 3)),  # seven steps an epoch
    ],
)
def test_batches_are_those_that_were_trained(
    options: dict[str, Any], epochs: int, counts: tuple[int, int]
) -> None:
    assert count_batches(OmegaConf.create(options), 20, epochs) == counts
    assert TrainingTime([0.5] * epochs, *counts).total_s == 0.5 * ((epochs - 1) * counts[0] + counts[1])


def test_arms_are_put_beside_their_baseline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arm in ("fixed", "grown"):
        (tmp_path / f"{arm}-seed0").mkdir()
    times = {"fixed": TrainingTime([0.2, 0.2], 100, 100), "grown": TrainingTime([0.1, 0.2], 100, 100)}
    monkeypatch.setattr(
        training_time, "time_training", lambda path, _: times[path.name.removesuffix("-seed0")]
    )
    page = tmp_path / "page.md"
    page.write_text("<!-- begin of `elastic training_time` -->\n<!-- end of `elastic training_time` -->")
    show_training_time(f"{tmp_path}/*-seed0", baseline="fixed", csv=tmp_path / "times.csv", markdown=page)
    assert "| grown | 100 | 200 | 30 | 0.75 |\n\nProcessor time on " in page.read_text()
    rows = list(csv.reader((tmp_path / "times.csv").read_text().splitlines()))
    assert rows[1:] == [["fixed", "200", "200", "40", "1.00"], ["grown", "100", "200", "30", "0.75"]]
    with pytest.raises(OptionError, match=r"no dense among .*: name fixed, grown"):
        show_training_time(f"{tmp_path}/*-seed0", baseline="dense")


@pytest.mark.parametrize(
    ("text", "target", "reason"),
    [
        (None, "markdown", "is missing: write it first"),
        ("# A page", "markdown", "there is no place for the table"),
        (None, "csv", "make the folder"),
    ],
)
def test_where_no_table_can_be_written_nothing_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, target: str, reason: str
) -> None:
    (tmp_path / "grown-seed0").mkdir()
    monkeypatch.setattr(training_time, "time_training", lambda *_: pytest.fail("it is timed"))
    page = tmp_path / ("page.md" if target == "markdown" else "missing/times.csv")
    if text is not None:
        page.write_text(text)
    with pytest.raises(FileError, match=reason):
        show_training_time(f"{tmp_path}/*-seed0", **{target: page})
