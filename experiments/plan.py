"""Carry out a plan: many runs side by side on one machine, each as soon as what it starts from is finished.

    python -m experiments.plan file=experiments/cifar10.yaml [workers=6] [only='gnap_cifar10/*']

A plan is a YAML file: `common`, options that all runs have, and `arms`, by name (`<question>/<arm>`), each
with its `seeds` and `options`, those of `elastic train`. `{seed}` stands for the seed and `{runs}` for the
folder that the runs are in, so that `init={runs}/question/dense-seed{seed}` starts from another run of the
plan, and waits for it. What is finished is left alone, and what has begun goes on from its last checkpoint:
the same command again carries out the rest. What a run prints is in a file beside its folder.
"""

import json
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from elastic.errors import OptionError, TrainingError
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.folders import CHECKPOINT, SUMMARY
from elastic.experiments.tools.metrics import find_metric
from elastic.experiments.tools.options import call
from elastic.ranges import Count

POLL_S = 0.5
TRAIN = (sys.executable, "-W", "ignore", "-m", "elastic.experiments.train")


@dataclass(frozen=True)
class PlannedRun:
    """Hold a run of a plan.

    Attributes:
        name: of the plan's arm, with the seed.
        needs: names of the runs that it starts from.
    """

    name: str
    folder: Path
    options: tuple[str, ...]
    needs: frozenset[str]

    @property
    def arm(self) -> str:
        """Name the run's arm."""
        return self.name.rpartition("-seed")[0]

    @property
    def is_finished(self) -> bool:
        return (self.folder / SUMMARY).exists()

    def list_words(self) -> list[str]:
        """List the words of the command line that starts it, or lets it go on."""
        begun = (self.folder / CHECKPOINT).exists()
        return [*(() if begun else self.options), f"run={self.folder}"]


def carry_out(file: Path, runs: Path = Path("outputs/plan"), workers: Count = 1, only: str = "*") -> None:
    """Carry out a plan.

    Args:
        file: the plan.
        runs: the folder that its runs are in, or come to.
        workers: runs at a time.
        only: a pattern of arms; the others are left out.

    Raises:
        OptionError: the file is no plan, or has no such arm.
        TrainingError: runs have failed; the others are finished.
    """
    plan = [planned for planned in read_plan(file, runs) if fnmatch(planned.arm, only)]
    if not plan:
        raise OptionError(f"{file} has no arm {only}: name one of its arms")
    failed = run_side_by_side(plan, workers)
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(plan)} runs have failed, {', '.join(failed)}: see {runs}/<run>.log"
        )


def read_plan(file: Path, runs: Path) -> list[PlannedRun]:
    """Read a plan's runs, arm by arm.

    Raises:
        OptionError: the file is no plan.
    """
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        common = [str(word) for word in content.get("common", ())]
        arms = {
            name: (list(arm["seeds"]), [*common, *arm["options"]]) for name, arm in content["arms"].items()
        }
        pairs = {f"{name}-seed{k}": (k, words) for name, (seeds, words) in arms.items() for k in seeds}
        filled = {
            name: (f"seed={seed}", *(word.format(seed=seed, runs=runs) for word in words))
            for name, (seed, words) in pairs.items()
        }
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise OptionError(f"{file} is no plan ({error!r:.80}): see elastic plan --help") from error
    needs = {
        name: frozenset(other for other in filled if any(w.endswith(f"={runs / other}") for w in words))
        for name, words in filled.items()
    }
    return [PlannedRun(name, runs / name, words, needs[name]) for name, words in filled.items()]


def run_side_by_side(plan: Sequence[PlannedRun], workers: int) -> list[str]:
    """Train what is not finished, in order, so many at a time; return the names of what could not be."""
    waiting = [planned for planned in plan if not planned.is_finished]
    print(f"{len(plan) - len(waiting)} of {len(plan)} runs are finished", flush=True)
    unfinished, failed = {planned.name for planned in waiting}, list[str]()
    under_way: dict[PlannedRun, subprocess.Popen[bytes]] = {}
    start = time.monotonic()
    try:
        while waiting or under_way:
            for planned in list_ready(waiting, unfinished, workers - len(under_way)):
                waiting.remove(planned)
                if lost := planned.needs & set(failed):
                    failed.append(planned.name)
                    unfinished.discard(planned.name)
                    print(f"{planned.name}: left out, {', '.join(lost)} has failed", flush=True)
                else:
                    under_way[planned] = start_run(planned)
            for planned in [planned for planned, process in under_way.items() if process.poll() is not None]:
                code = under_way.pop(planned).returncode
                failed += [planned.name] * bool(code)
                unfinished.discard(planned.name)
                print(describe_end(planned, code, time.monotonic() - start), flush=True)
            if waiting and not under_way and not list_ready(waiting, unfinished, 1):
                names = ", ".join(planned.name for planned in waiting)
                raise OptionError(f"{names} start from each other: let one of them start from none")
            time.sleep(POLL_S)
    finally:
        stop(list(under_way.values()))
    return failed


def list_ready(waiting: Sequence[PlannedRun], unfinished: Collection[str], count: int) -> list[PlannedRun]:
    """List the next runs, `count` at most, that start from none that is unfinished."""
    return [planned for planned in waiting if not planned.needs & set(unfinished)][: max(0, count)]


def start_run(planned: PlannedRun) -> "subprocess.Popen[bytes]":
    """Start a run in a process of its own."""
    planned.folder.parent.mkdir(parents=True, exist_ok=True)
    with planned.folder.with_name(f"{planned.folder.name}.log").open("ab") as log:
        return subprocess.Popen([*TRAIN, *planned.list_words()], stdout=log, stderr=subprocess.STDOUT)


def describe_end(planned: PlannedRun, code: int, seconds: float) -> str:
    """Describe what has become of a run."""
    if code:
        return f"{seconds:6.0f} s  {planned.name}: failed"
    summary = json.loads((planned.folder / SUMMARY).read_text())
    figure = summary[find_metric(summary)]
    return (
        f"{seconds:6.0f} s  {planned.name}: {figure:.4f}, {summary['params']:,} params, {summary['wall_s']} s"
    )


def stop(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Stop runs, which keep their last checkpoints."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def main() -> None:
    call(carry_out)


if __name__ == "__main__":
    run(main)
