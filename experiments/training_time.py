"""Time the training of finished runs on this machine: `elastic training_time runs='<glob>'`.

Runs may be from a machine where other things count: on a GPU, a small network's step takes as long as a
wide one's. So each is carried out again on one thread with a few batches of every epoch, and grows when it
grew. Its training takes the median time from one batch to the next, times the batches of an epoch, over all
epochs that it has trained, whatever has ended it. It is processor time, which others on the machine disturb
least. Validation does not count.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from omegaconf import DictConfig, open_dict

from elastic.callbacks import Census
from elastic.callbacks.base import ElasticCallback
from elastic.errors import OptionError, TrainingError
from elastic.experiments.tools.arms import name_arms
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.folders import check_finished, is_pruned, load_config
from elastic.experiments.tools.hardware import find_cpu
from elastic.experiments.tools.options import call
from elastic.experiments.tools.parts import make_callbacks
from elastic.experiments.tools.restore import read_summary
from elastic.experiments.tools.tables import (
    check_targets,
    format_markdown,
    print_table,
    write_between_marks,
    write_csv,
)
from elastic.experiments.train import build, make_trainer
from elastic.ranges import Range

HEAD = ("arm", "first epoch, ms a step", "last epoch, ms a step", "training (s)")
Clock = Callable[[], float]


class StepClock(L.Callback):
    """Time the steps of each epoch, from the end of one to that of the next, with the loading of a batch."""

    def __init__(self, clock: Clock, epochs: int) -> None:
        self.clock, self.epochs = clock, epochs
        self.steps_s: list[float] = []  # of each epoch, the median
        self.batches = 0  # of an epoch, as a whole
        self._ends: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ends = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._ends.append(self.clock())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if len(self._ends) < 2:
            raise TrainingError("an epoch of one batch cannot be timed: name runs of smaller batches")
        pairs = zip(self._ends, self._ends[1:], strict=False)
        self.steps_s.append(statistics.median(end - start for start, end in pairs))
        assert trainer.train_dataloader is not None
        self.batches = len(trainer.train_dataloader)
        trainer.should_stop = len(self.steps_s) == self.epochs


@dataclass(frozen=True)
class TrainingTime:
    """Hold the seconds of a step in each epoch, how many steps an epoch has, and the last one."""

    steps_s: Sequence[float]
    batches: int
    last: int

    @property
    def total_s(self) -> float:
        return sum(self.steps_s[:-1]) * self.batches + self.steps_s[-1] * self.last


def time_training(folder: Path, batches: int, clock: Clock = time.process_time) -> TrainingTime:
    """Carry out a finished run again with a few batches of every epoch.

    Raises:
        FileError: the folder holds no finished run.
        OptionError: it has trained no epoch.
        TrainingError: an epoch has one batch.
    """
    cfg = load_config(check_finished(folder))
    epochs = read_summary(folder).get("epochs")
    if not epochs or is_pruned(folder):
        raise OptionError(f"{folder} holds a network that has not been trained there: leave it out of runs")
    planned = cfg.trainer.copy()
    shorten(cfg, folder, batches, epochs)
    torch.set_num_threads(1)
    step_clock = StepClock(clock, epochs)
    with tempfile.TemporaryDirectory() as name:
        module, data = build(cfg)
        own = [
            c
            for c in make_callbacks(cfg).values()
            if isinstance(c, ElasticCallback) and not isinstance(c, Census)
        ]
        trainer = make_trainer(cfg, [*own, step_clock], Path(name))
        trainer.fit(module, data)
    return TrainingTime(step_clock.steps_s, *count_batches(planned, step_clock.batches, epochs))


def count_batches(planned: DictConfig, batches: int, epochs: int) -> tuple[int, int]:
    """Count the batches that an epoch of a run had, and those of its last one, which steps may have ended.

    Args:
        planned: the options of its trainer.
        batches: that its data has.
        epochs: that it has trained, the last one included.
    """
    limit = planned.get("overfit_batches") or planned.get("limit_train_batches")
    if limit is not None:
        batches = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
    steps = planned.get("max_steps") or -1
    if steps < 1:
        return batches, batches
    accumulated = planned.get("accumulate_grad_batches") or 1
    remaining = steps - (epochs - 1) * math.ceil(batches / accumulated)
    return batches, min(batches, remaining * accumulated)


def shorten(cfg: DictConfig, folder: Path, batches: int, epochs: int) -> None:
    """Leave out of a run's configuration all that does not belong to a step.

    Args:
        batches: of each epoch.
        epochs: that the run has trained, which it planned where steps, or time alone, have ended it.
    """
    is_planned = (cfg.trainer.get("max_steps") or -1) < 1 and cfg.trainer.get("max_epochs") not in (None, -1)
    with open_dict(cfg):
        cfg.trainer.update(
            accelerator="cpu",
            devices=1,
            max_epochs=cfg.trainer.max_epochs if is_planned else epochs,
            max_steps=-1,
            max_time=None,
            overfit_batches=0,
            limit_train_batches=batches,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
        )
        cfg.logger = {}
        cfg.callbacks.progress = None
        if cfg.callbacks.get("growth") is not None:
            cfg.callbacks.growth.timeline = str(folder / "timeline.jsonl")


def show_training_time(
    runs: str,
    batches: Annotated[int, Range(2)] = 4,
    baseline: str | None = None,
    csv: Path | None = None,
    markdown: Path | None = None,
) -> None:
    """Show what the training of finished runs takes on one thread of this machine.

    Args:
        runs: a glob of their folders; one seed of each arm is enough.
        batches: of each epoch that are carried out.
        baseline: the arm that others are divided by.
        csv: the table as a file.
        markdown: a text to put it into, between marks as those of compare.

    Raises:
        OptionError: there is no run, or none of the baseline.
        FileError: the table cannot be written.
    """
    check_targets("training_time", csv, markdown)
    arms = {arm: folder for folder, arm in name_arms(runs).items()}
    if not arms or (baseline is not None and baseline not in arms):
        names = ", ".join(arms) or "folders of finished runs"
        raise OptionError(f"there is no {baseline or 'run'} among {runs}: name {names}")
    times = {arm: time_training(folder, batches) for arm, folder in arms.items()}
    head, rows = list(HEAD), [make_row(arm, training) for arm, training in times.items()]
    if baseline is not None:
        head.append(f"÷ {baseline}")
        for row, training in zip(rows, times.values(), strict=True):
            row.append(f"{training.total_s / times[baseline].total_s:.2f}")
    print_table(head, rows, width=110)
    note = f"Processor time on {find_cpu()}: the median of {batches - 1} steps of each epoch."
    print(note)
    if csv is not None:
        write_csv(csv, head, rows)
    if markdown is not None:
        write_between_marks(markdown, "training_time", f"{format_markdown(head, rows)}\n\n{note}")


def make_row(arm: str, training: TrainingTime) -> list[str]:
    """Make a row of the table."""
    first, last = training.steps_s[0], training.steps_s[-1]
    return [arm, f"{1e3 * first:.0f}", f"{1e3 * last:.0f}", f"{training.total_s:.0f}"]


def main() -> None:
    silence()
    call(show_training_time)


if __name__ == "__main__":
    run(main)
