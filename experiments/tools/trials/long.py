"""Let runs be long: many events and saves in one run, many runs in a sweep, many requests to a runtime.

What may grow with them is the network, and nothing else: memory, file handles and the time of a step.
"""

import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from elastic.callbacks import Census
from elastic.callbacks.base import ElasticCallback
from elastic.experiments.tools import sweep
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.folders import SUMMARY
from elastic.experiments.tools.sweep import FAILED
from elastic.experiments.tools.trials import Part
from elastic.experiments.tools.trials.composing import QUIET, SHORT
from elastic.experiments.tools.trials.forks import fork, wait
from elastic.experiments.tools.trials.programs import Foreign, make_foreign_loader
from elastic.experiments.train import main
from elastic.levels.nested import Levels
from elastic.levels.runtime import Runtime
from elastic.levels.sizes import level_sizes
from elastic.models import convnet
from elastic.surgery.reindexing import grow_index
from elastic.training.checkpoints import AtomicCheckpoints
from elastic.widths.discovery import discover

CLAIM = "memory, handles and the time of a step stay as they are, counts are right, no request is lost"
REQUESTS = 1_000_000  # of which the others are shares: events and saves of one run, runs of a sweep
EVENTS, RUNS = 200, 500
GROWTH_MB = 64  # of memory that allocators may keep, over a whole run
SLOWER = 2.0  # the last steps against the first: other programs share the machine


def try_long(part: Part, trials: int, random: Random, folder: Path) -> None:
    """Do each of the three as often as trials have it, with 10⁶ requests as the whole."""
    share = trials / REQUESTS
    events, runs = max(20, round(EVENTS * share)), max(10, round(RUNS * share))
    _try_apart(part, partial(try_events, events, random.randrange(1000), folder / "events"), folder)
    _try_apart(part, partial(try_sweep, runs, folder / "sweep"), folder)
    _try_apart(part, partial(try_requests, trials, random.randrange(1000)), folder)


def _try_apart(part: Part, work: Callable[[], tuple[str, int, list[str]]], folder: Path) -> None:
    """Do it in a process of its own, whose memory tells of nothing else."""
    answer, output = folder / "answer.json", folder / "said"
    code = wait(fork(lambda: answer.write_text(json.dumps(work())), output, patience_s=1500))
    if code:
        part.fail(f"it ends with {code} and says {output.read_text()[-250:]}")
        return
    outcome, times, faults = json.loads(answer.read_text())
    part.count(outcome, times)
    for fault in faults:
        part.fail(fault)


def measure_memory_mb() -> float:
    """Measure the memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def count_handles() -> int:
    """Count the files that this process holds open."""
    return len(os.listdir("/proc/self/fd"))


class _Watch:
    """Take memory and handles from time to time, and compare the ends."""

    def __init__(self) -> None:
        self.memory: list[float] = []
        self.handles: list[int] = []

    def take(self) -> None:
        self.memory.append(measure_memory_mb())
        self.handles.append(count_handles())

    def find_faults(self, name: str) -> list[str]:
        """Find growth from the first quarter, when all is warm, to the end."""
        begin = len(self.memory) // 4
        faults = []
        if (grown := self.memory[-1] - self.memory[begin]) > GROWTH_MB:
            faults.append(f"{name}: memory has grown by {grown:.0f} MB")
        if self.handles[-1] > self.handles[begin]:
            faults.append(f"{name}: {self.handles[begin]} open files have become {self.handles[-1]}")
        return faults


# --- one run -----------------------------------------------------------------------------------------


class _Breathe(ElasticCallback):
    """Grow a width by a channel at an epoch's start, and take it away at the next, in turn."""

    changes_structure = True

    def __init__(self, watch: _Watch) -> None:
        self.watch, self._start = watch, 0.0
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch.take()
        widths = self.structure.widths
        name = list(widths)[trainer.current_epoch // 2 % len(widths)]
        size = widths[name].size
        index = list(range(size - 1)) if trainer.current_epoch % 2 else grow_index(size, 1)
        self.structure.restructure({name: torch.as_tensor(index)}, "grow and prune")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = time.process_time()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(time.process_time() - self._start)


def try_events(events: int, seed: int, folder: Path) -> tuple[str, int, list[str]]:
    """Change and save a network in each epoch of one run."""
    folder.mkdir()
    watch = _Watch()
    breathe = _Breathe(watch)
    loader, module = make_foreign_loader(seed), Foreign()
    start = {name: parameter.shape for name, parameter in module.named_parameters()}
    keep = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    trainer = L.Trainer(
        max_epochs=events,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[breathe, Census(str(folder)), keep],
        plugins=[AtomicCheckpoints()],
    )
    trainer.fit(module, loader, loader)
    faults = watch.find_faults("one run")
    rows = (folder / "timeline.jsonl").read_text().splitlines()
    if len(rows) != events:
        faults.append(f"one run: {events} events, and {len(rows)} in the timeline")
    if events % 2 == 0 and start != {name: parameter.shape for name, parameter in module.named_parameters()}:
        faults.append("one run: what has grown and been pruned as often has another size")
    fifth = len(breathe.seconds) // 5
    before, after = (statistics.median(s) for s in (breathe.seconds[:fifth], breathe.seconds[-fifth:]))
    if after > SLOWER * before:
        faults.append(f"one run: a step takes {1e3 * after:.1f} ms, and took {1e3 * before:.1f}")
    return "events and saves in one run", events, faults


# --- a sweep -----------------------------------------------------------------------------------------


def try_sweep(runs: int, folder: Path) -> tuple[str, int, list[str]]:
    """Carry out many runs by one command, a tenth of which cannot be."""
    seeds = [str(k if k % 10 else -1 - k) for k in range(1, runs + 1)]  # no seed is below zero
    words = [*QUIET, *SHORT, "trainer.max_epochs=1", "trainer.limit_train_batches=1", "schedule=static"]
    words += ["logger=[]", "model.channels=[2,2,2]", f"seed={','.join(seeds)}"]
    sys.argv = ["train", "-m", f"hydra.sweep.dir={folder}", *words]
    output, errors = io.StringIO(), io.StringIO()
    watch, end = _Watch(), None
    describe = sweep.describe_progress

    def describe_watched(path: Path) -> str:
        watch.take()
        return describe(path) if len(watch.memory) % 50 == 0 else ""

    sweep.describe_progress = describe_watched  # type: ignore[assignment]  # called after each run
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            run(main)
        except SystemExit as error:
            end = error.code
    failing, faults = runs // 10, watch.find_faults("a sweep")
    finished = sum((path / SUMMARY).exists() for path in folder.iterdir())
    failed = sum((path / FAILED).exists() for path in folder.iterdir())
    if (finished, failed) != (runs - failing, failing):
        faults.append(f"a sweep: {finished} runs are done and {failed} have failed, of {runs} and {failing}")
    lines = errors.getvalue().strip().splitlines()
    if end != 1 or not lines or f"{failing} of {runs} runs have failed" not in lines[-1]:
        faults.append(f"a sweep: it ends with {end} and says {lines[-1:]}")
    return "runs of a sweep", runs, faults


# --- a runtime ---------------------------------------------------------------------------------------


class _Timed(nn.Module):
    """Know which level it is, and how often it was called."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        output: torch.Tensor = self.net(x_BCHW)
        return output


def try_requests(requests: int, seed: int) -> tuple[str, int, list[str]]:
    """Ask a runtime in this process, whose budget changes all the time, and count its answers."""
    torch.manual_seed(seed)
    x = torch.randn(1, 1, 4, 4)
    net = convnet([2, 4], [], 1, 3).eval()
    widths = discover(net, x)
    levels = Levels(net, widths, level_sizes(net, widths, x, [0.5]))
    timed = [_Timed(level.eval()) for level in levels]
    runtime = Runtime(timed, x)
    expected = [level(x).detach() for level in levels]
    for level in timed:
        level.calls = 0
    deadlines = [runtime.costs[0].latency_ms * 1.5, runtime.costs[-1].latency_ms * 100]
    watch, answers, wrong, changes = _Watch(), 0, 0, 0
    for request in range(requests):
        if request % 1000 == 0:
            runtime.within(latency_ms=deadlines[request // 1000 % 2])
            changes += 1
            watch.take()
        answer, k = runtime.answer(x)
        answers += 1
        wrong += not torch.equal(answer, expected[k])
    faults = watch.find_faults("a runtime")
    if answers != requests or sum(level.calls for level in timed) != requests:
        faults.append(f"a runtime: {answers} answers to {requests} requests")
    if wrong:
        faults.append(f"a runtime: {wrong} answers of another level than it says")
    if requests > 1000 and not all(level.calls for level in timed):
        faults.append(f"a runtime: its level has not changed in {changes} budgets")
    return "requests to a runtime", requests, faults
