"""The time of a finished run's training, from a few batches of each epoch: it has to be that run's."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from elastic.errors import FileError, OptionError
from elastic.experiments import training_time
from elastic.experiments.train import train
from elastic.experiments.training_time import StepClock, TrainingTime, show_training_time, time_training
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


def test_arms_are_put_beside_their_baseline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arm in ("fixed", "grown"):
        (tmp_path / f"{arm}-seed0").mkdir()
    times = {"fixed": TrainingTime([0.2, 0.2], 100), "grown": TrainingTime([0.1, 0.2], 100)}
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
