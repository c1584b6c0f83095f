"""Carry out the programs that trials kill: runs of each schedule, in two processes, foreign ones, a sweep."""

import io
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic.callbacks import Census, GrowOnSaturation, PruneByGates
from elastic.experiments.tools.folders import CHECKPOINT, CONFIG, SUMMARY, load_config
from elastic.experiments.tools.processes import watch_processes
from elastic.experiments.tools.trials.composing import CHANGING, QUIET, SHORT, compose_run
from elastic.experiments.tools.trials.forks import fork, wait
from elastic.experiments.train import main
from elastic.files.zoo import WEIGHTS
from elastic.growth import Growth, Periodic
from elastic.training.checkpoints import AtomicCheckpoints

TIMELINE, HISTORY = "timeline.jsonl", "history.jsonl"
Train = Callable[[DictConfig, Path], Any]
EPOCHS = "trainer.max_epochs=5"
GROWN = (EPOCHS, *CHANGING)
FOLDER = ("data=folder", "data.size=8", "data.workers=1")
LEVELS = ("schedule=[{}]", "callbacks.{}.fractions=[0.5,0.8]")
# What each run is told. Its first epochs have to hold whatever can happen to it.
RUNS: dict[str, tuple[str, ...]] = {
    "growth+gates": GROWN,
    "magnitude": (
        *(EPOCHS, "schedule=[magnitude]", "callbacks.magnitude.budget=1500"),
        *("callbacks.magnitude.begin=0", "callbacks.magnitude.end=0.8"),
    ),
    "joint": (EPOCHS, *(word.format("joint") for word in LEVELS)),
    "reconstruct": ("trainer.max_epochs=6", *(word.format("reconstruct") for word in LEVELS)),
    "dynamic": (
        *(EPOCHS, "schedule=[dynamic]", "callbacks.dynamic.gain=[1,3]"),
        *("callbacks.dynamic.begin=0", "callbacks.dynamic.end=0.6"),
    ),
    "distil": (*GROWN, "schedule=[growth,gates,distil]"),
    "ema": (*GROWN, "schedule=[growth,gates,ema]", "callbacks.ema.decay=0.8"),
    "read by a process": (*GROWN, *FOLDER, "trainer.max_epochs=3"),
    "two processes": (*GROWN, "trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=16"),
}


@dataclass(frozen=True)
class Program:
    """Say how to carry out a program in a folder, and what it has to have come to.

    Attributes:
        carry_out: from the start, or from what the folder holds.
        folders: below its own, those that hold runs.
        fault: what is missing in the folder of an uninterrupted run for a kill of it to be a trial.
    """

    name: str
    carry_out: Callable[[Path], Any]
    folders: Sequence[str]
    fault: Callable[[Path], str | None]


def make_programs(train: Train, seed: int, folder: Path) -> dict[str, Program]:
    """Make all programs, with a seed of their own.

    Args:
        train: carries out a configuration in a folder.
        folder: where the teacher is.
    """
    programs = {}
    teacher = folder / "teacher"
    if not teacher.exists():
        cfg = compose_run(teacher, ("trainer.max_epochs=1", "schedule=static", "logger=[]", *SHORT))
        with redirect_stdout(io.StringIO()):
            train(cfg, teacher)  # in this process, which then has imported all that a run does
    for name, words in RUNS.items():
        words = (*SHORT, *words, f"seed={seed}")
        if name == "distil":
            words = (*words, f"init={teacher}")
        elif name == "read by a process":
            words = (*words, f"data.root={write_images(folder / 'data', seed)}")
        cfg = compose_run(folder, words)
        work = carry_out_in_two if name == "two processes" else carry_out
        programs[name] = Program(name, partial(work, train, cfg), [""], _make_check(name))
    programs["foreign module"] = Program(
        "foreign module", lambda place: carry_out_foreign(place, seed), [""], _check_foreign
    )
    seeds = (2 * seed, 2 * seed + 1)
    runs = [f"-seed{seed}" for seed in seeds]
    programs["sweep"] = Program("sweep", lambda place: carry_out_sweep(place, seeds), runs, _check_sweep)
    return programs


def write_images(folder: Path, seed: int) -> Path:
    """Write a few images of two classes, unless they are there."""
    random = np.random.default_rng(seed)
    for part in ("train", "test") if not folder.exists() else ():
        for name in ("one", "two"):
            (folder / part / name).mkdir(parents=True)
            for i in range(48):
                image = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
                image.save(folder / part / name / f"{i}.png")
    return folder


def carry_out(train: Train, cfg: DictConfig, folder: Path) -> None:
    """Carry out a run, or go on with the one in its folder as `run=<folder>` does."""
    if (folder / CONFIG).exists():
        cfg = load_config(folder)
    cfg.run = str(folder)
    train(cfg, folder)


def carry_out_in_two(train: Train, cfg: DictConfig, folder: Path) -> None:
    """Carry out a run in this process and another one, which talk by gloo."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    group = os.getpgid(0)

    def begin(rank: int) -> None:
        os.setpgid(0, group)
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
        rank_zero_only.rank = rank  # type: ignore[attr-defined]  # read as Lightning is imported
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        carry_out(train, cfg, folder)

    second = fork(lambda: begin(1))
    watch_processes([second])
    begin(0)
    if wait(second):
        raise RuntimeError("the second process has failed")


def carry_out_sweep(folder: Path, seeds: Sequence[int]) -> None:
    """Carry out a sweep by its command line."""
    words = [word for word in (*QUIET, *SHORT, *GROWN) if word != EPOCHS]
    axis = f"seed={','.join(map(str, seeds))}"
    sys.argv = ["train", "-m", f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=-seed${seed}"]
    sys.argv += [*words, "trainer.max_epochs=3", axis]
    main()


class Foreign(L.LightningModule):
    """Train a classifier that knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)),
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val/acc", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.2)


def make_foreign_loader(seed: int) -> DataLoader[Any]:
    """Make images of four classes."""
    L.seed_everything(seed, verbose=False)
    images, labels = torch.randn(96, 1, 8, 8), torch.randint(4, (96,))
    images[:, :, :4] += labels.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(images, labels), batch_size=32)


def carry_out_foreign(folder: Path, seed: int) -> None:
    """Fit a foreign module as its own program does: from its last checkpoint, if there is one."""
    loader = make_foreign_loader(seed)
    folder.mkdir(exist_ok=True)
    grow = GrowOnSaturation(Periodic(2), Growth(factor=1.5, ceiling=2), until=0.9)
    prune = PruneByGates(penalty=1.0, begin=0.0, end=0.9, grain="channel", grace=1)
    keep = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    trainer = L.Trainer(
        max_epochs=6,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[grow, prune, Census(str(folder)), keep],
        plugins=[AtomicCheckpoints()],
    )
    last = folder / CHECKPOINT
    trainer.fit(Foreign(), loader, loader, ckpt_path=last if last.exists() else None)


# --- what must have happened -----------------------------------------------------------------------


def _make_check(name: str) -> Callable[[Path], str | None]:
    def check(folder: Path) -> str | None:
        summary = json.loads((folder / SUMMARY).read_text())
        events = read_events(folder)
        if "gates" in summary["schedule"] and not {"grow", "prune"} <= events and summary["epochs"] > 3:
            return f"it has not grown and been pruned: {events}"
        if name in ("joint", "reconstruct") and len(summary["levels"]) != 3:
            return "it has not three levels"
        if name == "reconstruct" and not {"grow", "prune"} <= events:
            return "it has not been pruned to a core and grown back"
        if name == "dynamic" and len(summary["sets"]) != 2:
            return "it has not two sets of modules"
        if name == "magnitude" and summary["params"] > 1530:
            return "it has not been pruned"
        return None

    return check


def _check_foreign(folder: Path) -> str | None:
    events = read_events(folder)
    return None if {"grow", "prune"} <= events else f"it has not grown and been pruned: {events}"


def _check_sweep(folder: Path) -> str | None:
    runs = [path for path in folder.iterdir() if path.is_dir()]
    return None if all(map(read_events, runs)) and len(runs) == 2 else "its runs have not changed"


def read_events(folder: Path) -> set[str]:
    """Read of what kinds a run's events are."""
    rows = [json.loads(line) for line in (folder / TIMELINE).read_text().splitlines()]
    return {row["why"].partition(":")[0].partition(" ")[0] for row in rows}


# --- what must be the same -------------------------------------------------------------------------

STATES = ("state_dict", "optimizer_states", "lr_schedulers", "elastic", "epoch", "global_step", "callbacks")
CLOCKED = ("seconds", "wall_s")  # what depends on how long it took


def find_difference(program: Program, expected: Path, broken: Path) -> str | None:
    """Find where what was killed and went on differs from what was not."""
    for name in program.folders:
        if difference := _find_difference(expected / name, broken / name):
            return f"{name} {difference}".strip()
    return None


def _find_difference(expected: Path, broken: Path) -> str | None:
    if (expected / SUMMARY).exists():
        if not (broken / SUMMARY).exists():
            return "no summary"
        first, second = (json.loads((folder / SUMMARY).read_text()) for folder in (expected, broken))
        if not is_same(first, second):
            return f"another {SUMMARY}: " + ", ".join(key for key in first if first[key] != second.get(key))
    for name in (TIMELINE, WEIGHTS, HISTORY):
        if (expected / name).exists() and (expected / name).read_bytes() != (broken / name).read_bytes():
            return f"another {name}"
    first, second = (torch.load(folder / CHECKPOINT, weights_only=True) for folder in (expected, broken))
    for checkpoint in (first, second):  # of its folder's name, and of its own
        for key in [key for key in checkpoint["callbacks"] if "Checkpoint" in key]:
            del checkpoint["callbacks"][key]
    return next((f"another {key}" for key in STATES if not is_same(first.get(key), second.get(key))), None)


def is_same(first: Any, second: Any) -> bool:
    """Tell whether two states are, to the last bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        keys = first.keys() - set(CLOCKED)
        return keys == second.keys() - set(CLOCKED) and all(is_same(first[key], second[key]) for key in keys)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(is_same, first, second))
    return bool(first == second)


def make_random(seed: int, *words: Any) -> Random:
    """Make a generator of its own for each use."""
    return Random(f"{seed} {' '.join(map(str, words))}")
