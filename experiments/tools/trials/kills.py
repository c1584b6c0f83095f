"""Kill runs at any moment, and inside their writes: each goes on and ends as if it had not been killed."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from omegaconf import DictConfig

from elastic.experiments.tools.folders import CHECKPOINT, SUMMARY, load_config
from elastic.experiments.tools.restore import WEIGHTS
from elastic.experiments.tools.trials import Part

CLAIM = "the continued run is, bit for bit, the one that was never killed"
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "elastic", "epoch", "global_step")
Train = Callable[[DictConfig, Path], Any]


def try_kills(part: Part, trials: int, random: Random, cfg: DictConfig, train: Train, folder: Path) -> None:
    """Carry out a run in a process that is killed, go on in another one, and compare.

    Args:
        cfg: of the run.
        train: carries it out in a folder, from the start or from its checkpoint.
    """
    whole = folder / "whole"
    start = time.monotonic()
    _wait(_fork(partial(_train, cfg, train, whole)))
    seconds = time.monotonic() - start
    for trial in range(trials):
        broken = folder / str(trial)
        killed = sum(_kill(cfg, train, broken, random, seconds) for _ in range(random.choice((1, 1, 2))))
        code = _wait(_fork(partial(_train, cfg, train, broken)))
        difference = "it does not end" if code else _find_difference(whole, broken)
        if difference is None:
            part.count(f"the same after {killed} kills")
        else:
            part.fail(f"trial {trial}, {killed} kills: {difference}")
        shutil.rmtree(broken, ignore_errors=True)


def _kill(cfg: DictConfig, train: Train, folder: Path, random: Random, seconds: float) -> bool:
    """Kill a run in a write or at some moment; return whether it had not ended by then."""
    write = random.randrange(1, 16) if random.random() < 0.5 else 0
    process = _fork(partial(_train, cfg, train, folder, write))
    if not write:
        time.sleep(random.uniform(0.05, 0.95) * seconds)
        os.kill(process, signal.SIGKILL)
    return _wait(process) == -signal.SIGKILL


def _train(cfg: DictConfig, train: Train, folder: Path, write: int = 0) -> None:
    """Train from the start or from what is there, and die inside the n-th write, half of it done."""
    replace, writes = os.replace, 0

    def die(part: Any, path: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == write:
            Path(part).write_bytes(Path(part).read_bytes()[: writes * 7])
            os.kill(os.getpid(), signal.SIGKILL)
        replace(part, path)

    os.replace = die  # type: ignore[assignment]
    if (folder / "config.yaml").exists():
        cfg = load_config(folder)
    cfg.run = str(folder)
    train(cfg, folder)


def _fork(work: Callable[[], Any]) -> int:
    """Do work in a child process of this one, without a word."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
            os.dup2(nowhere.fileno(), sys.stderr.fileno())
        work()
        code = 0
    finally:
        os._exit(code)


def _wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _find_difference(whole: Path, broken: Path) -> str | None:
    """Find where two runs differ: in their weights, their events, or in the state of training."""
    if not (broken / SUMMARY).exists():
        return "no summary"
    for name in ("timeline.jsonl", WEIGHTS):
        if (whole / name).read_bytes() != (broken / name).read_bytes():
            return f"another {name}"
    one, two = (torch.load(folder / CHECKPOINT, weights_only=True) for folder in (whole, broken))
    return next((f"another {key}" for key in COMPARED if not _is_same(one[key], two[key])), None)


def _is_same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_is_same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_is_same, one, two))
    return bool(one == two)
