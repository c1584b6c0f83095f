"""The census, the timeline and the history of a run."""

import csv
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from elastic.files.atomic import write_lines
from elastic.measure import counts
from tests.fitted import EXACT, Run, Spy, fit, prepare

CHANGING = (
    *EXACT,
    "schedule=[growth,gates]",
    "trainer.max_epochs=8",
    "data.batch_size=128",
    "trigger=periodic",
    "trigger.every=2",
    "callbacks.growth.until=0.9",
    "callbacks.gates.begin=0.0",
    "callbacks.gates.grain=kernel",
    "callbacks.gates.grace=1",
    "callbacks.gates.penalty=0.3",
    "optimizer.lr=3e-2",
)


Counts = dict[tuple[Any, ...], int]


class Counter:
    """Count, on the network that makes each step and is validated, what the census is to count."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int, int]] = []
        self.steps: list[int] = []
        self.macs: Counts = {}

    def count(self, module: Any) -> int:
        """Count once for each structure."""
        key = tuple(p.shape for p in module.net.parameters())
        if key not in self.macs:
            self.macs[key] = counts.count_macs(module.net, module.structure.example)
        return self.macs[key]

    def look(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            net = module.net
            self.sizes.append((counts.count_params(net), counts.count_params_dense(net), self.count(module)))

    def step(self, trainer: Any, module: Any, out: Any, batch: Any, index: int) -> None:
        self.steps.append(3 * len(batch[1]) * self.count(module))

    def spy(self) -> Spy:
        return Spy(on_validation_start=self.look, on_train_batch_end=self.step)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Counter]:
    """A run that grows and is pruned; several tests look at it."""
    counter = Counter()
    return fit(tmp_path_factory.mktemp("changed"), *CHANGING, after=(counter.spy(),)), counter


def test_the_timeline_replayed_on_the_start_gives_the_end(changed: tuple[Run, Counter]) -> None:
    run, _ = changed
    events = [json.loads(line) for line in (run.folder / "timeline.jsonl").read_text().splitlines()]
    assert {event["why"].split(":")[0] for event in events} == {"grow", "prune"}
    sizes = dict(run.module.structure.start_sizes)
    for event in events:
        assert list(event) == ["epoch", "step", "why", "width", "before", "after"]
        assert sizes[event["width"]] == event["before"] != event["after"]
        sizes[event["width"]] = event["after"]
    assert sizes == run.module.structure.widths.sizes()
    places = [(event["epoch"], event["step"]) for event in events]
    assert places == sorted(places) and all(step == epoch * 10 for epoch, step in places)
    assert not list(run.folder.glob("*.part"))


def test_the_history_has_a_row_an_epoch_with_that_epochs_figures(changed: tuple[Run, Counter]) -> None:
    """Against the CSV logger's file, and against counts taken at the same moment."""
    run, counter = changed
    history = run.callbacks["census"].history
    assert [row["epoch"] for row in history] == list(range(8))
    assert [(row["params"], row["params_dense"], row["macs"]) for row in history] == counter.sizes
    assert len({row["params_dense"] for row in history}) > 1

    with (run.folder / "metrics" / "version_0" / "metrics.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["val/acc"]]
    assert len(lines) == 8
    for row, line in zip(history, lines, strict=True):
        assert int(line["epoch"]) == row["epoch"]
        assert {n for n in row if "/" in n} == {"train/acc", "train/loss", "val/acc", "val/loss"}
        for name in ("train/acc", "train/loss", "val/acc", "val/loss"):
            assert float(line[name]) == pytest.approx(row[name], rel=1e-6)
        for name in ("params", "params_dense", "macs"):
            assert float(line[f"size/{name}"]) == row[name]


def test_the_training_figures_are_the_mean_over_the_epochs_batches(tmp_path: Path) -> None:
    """Of a network that does not change, so that the loss is the cross entropy alone."""
    losses: dict[int, list[float]] = {}

    def after_step(trainer: Any, module: Any, out: Any, *_: Any) -> None:
        losses.setdefault(trainer.current_epoch, []).append(out["loss"].item())

    spy = Spy(on_train_batch_end=after_step)
    run = fit(tmp_path, *EXACT, "schedule=static", "trainer.max_epochs=3", after=(spy,))
    found = [row["train/loss"] for row in run.callbacks["census"].history]
    assert found == pytest.approx([sum(rows) / len(rows) for rows in losses.values()], rel=1e-6)


def test_the_sanity_check_and_later_validation_are_no_epochs(tmp_path: Path) -> None:
    run = fit(tmp_path, *EXACT, "trainer.num_sanity_val_steps=1", "trainer.max_epochs=2")
    run.trainer.validate(run.module, run.data, verbose=False)
    history = run.callbacks["census"].history
    assert [row["epoch"] for row in history] == [0, 1]


def test_two_validations_in_an_epoch_make_one_row(tmp_path: Path) -> None:
    run = fit(tmp_path, *EXACT, "schedule=[gates]", "+trainer.val_check_interval=0.5", "trainer.max_epochs=2")
    assert [row["epoch"] for row in run.callbacks["census"].history] == [0, 1]


def test_training_macs_by_hand(tmp_path: Path) -> None:
    """3 passes over 2 epochs of 5 batches of 256 through 8×8, 8×8, 4×4, 4×4 positions and one."""
    run = fit(tmp_path, *EXACT, "schedule=static", "trainer.max_epochs=2", "data.batch_size=256")
    once = 64 * (4 * 1 * 9 + 6 * 4 * 9) + 16 * (6 * 6 * 9 + 8 * 6 * 9) + 10 * 8
    assert run.callbacks["census"].macs_training == 3 * 2 * 5 * 256 * once


TWICE = ("+trainer.val_check_interval=0.5", "+trainer.limit_train_batches=4")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("+trainer.check_val_every_n_epoch=3", "trigger.every=1"), marks=pytest.mark.slow),
        pytest.param((*TWICE, "callbacks.growth.monitor=train/loss"), marks=pytest.mark.slow),
        ("+trainer.accumulate_grad_batches=3", "trainer.num_sanity_val_steps=1", "trainer.max_epochs=4"),
    ],
    ids=["every third", "twice an epoch", "accumulated"],
)
def test_training_macs_are_those_of_every_step(tmp_path: Path, options: tuple[str, ...]) -> None:
    counter = Counter()
    check_steps(fit(tmp_path, *CHANGING, *options, after=(counter.spy(),)), counter)


def test_training_macs_are_those_of_every_step_where_channels_leave(changed: tuple[Run, Counter]) -> None:
    check_steps(*changed)


def check_steps(run: Run, counter: Counter) -> None:
    """Compare with a count step by step, on the network that makes the step."""
    assert len(counter.macs) > 1, "nothing has changed: the test shows nothing"
    assert run.callbacks["census"].macs_training == sum(counter.steps)


def test_a_last_batch_counts_for_what_it_holds(tmp_path: Path) -> None:
    run = prepare(tmp_path, *EXACT, "schedule=static", "trainer.max_epochs=1")
    run.data.prepare_data()
    part = run.data.train_set
    assert part is not None and len(part) % 500 > 0
    loader = DataLoader(part, batch_size=500, collate_fn=lambda batch: batch)
    run.data.train_dataloader = lambda: loader  # type: ignore[method-assign]
    run.fit()
    once = counts.count_macs(run.module.net, run.module.structure.example)
    assert run.callbacks["census"].macs_training == 3 * len(part) * once


def test_a_timeline_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing half-written beside it."""
    path = tmp_path / "timeline.jsonl"
    write_lines(path, [{"epoch": 1}])

    def full(self: Path, text: str, *_: Any, **__: Any) -> int:
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_lines(path, [{"epoch": 1}, {"epoch": 2}])
    monkeypatch.undo()
    assert path.read_text() == '{"epoch": 1}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["timeline.jsonl"]
