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
from typing import Any, TypeVar

import yaml

from elastic.errors import OptionError, TrainingError, cite
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.folders import CHECKPOINT, SUMMARY
from elastic.experiments.tools.metrics import find_metric
from elastic.experiments.tools.options import TRUST, call
from elastic.ranges import Count

T = TypeVar("T")
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
        has_begun = (self.folder / CHECKPOINT).exists()
        options = [word for word in self.options if word.startswith(TRUST) or not has_begun]
        return [*options, f"run={self.folder}"]


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
        OptionError: the file is no plan, or a run starts from one that is not there.
    """
    filled = {
        f"{name}-seed{seed}": (
            f"seed={seed}",
            *(_fill(word, seed, runs, f"{file}: {name}") for word in words),
        )
        for name, (seeds, words) in _read_arms(file).items()
        for seed in seeds
    }
    folders = {runs / name: name for name in filled}
    needs = {}
    for name, words in filled.items():
        paths = {word: Path(word.partition("=")[2]) for word in words}
        needs[name] = frozenset(folders[path] for path in paths.values() if path in folders)
        for word, path in paths.items():
            if word.startswith(f"init={runs}/") and path not in folders and not path.exists():
                raise OptionError(
                    f"{file}: {name} has {word}, which is no run of the plan: name one of its runs"
                )
    return [PlannedRun(name, runs / name, words, needs[name]) for name, words in filled.items()]


def _read_arms(file: Path) -> dict[str, tuple[list[int], list[str]]]:
    """Read the seeds of each arm and its options, the common ones first."""
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{file} is no plan ({cite(error)}): see elastic plan --help") from error
    plan = _check_mapping(content, ("common", "arms"), f"{file}")
    common = _check_list(plan.get("common", []), str, f"{file}: common", "[trainer.max_epochs=9]")
    arms = {}
    for name, node in _check_mapping(plan.get("arms"), (), f"{file}: arms").items():
        arm = _check_mapping(node, ("seeds", "options"), f"{file}: {name}")
        seeds = _check_list(arm.get("seeds"), int, f"{file}: seeds of {name}", "[0, 1]")
        own = _check_list(arm.get("options"), str, f"{file}: options of {name}", "[schedule=gates]")
        arms[name] = (seeds, [*common, *own])
    return arms


def _check_mapping(node: Any, keys: Collection[str], place: str) -> dict[str, Any]:
    """Return what has to be a mapping of names, of these if there are any."""
    if not isinstance(node, dict) or not all(isinstance(key, str) for key in node):
        names = " and ".join(keys) or "names, in quotes where they are numbers"
        raise OptionError(f"{place} is no plan, it is {_shorten(node)}: write a mapping of {names}")
    if unknown := [key for key in node if keys and key not in keys]:
        raise OptionError(f"{place} is no plan, it has '{unknown[0]}': write {' and '.join(keys)} alone")
    return node


def _check_list(node: Any, kind: type[T], place: str, example: str) -> list[T]:
    if not isinstance(node, list) or not all(type(value) is kind for value in node):
        raise OptionError(f"{place} cannot be {_shorten(node)}: write a list such as {example}")
    return node


def _fill(word: str, seed: int, runs: Path, place: str) -> str:
    """Put seed and folder into an option."""
    try:
        return word.format(seed=seed, runs=runs)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise OptionError(
            f"{place} has {word}, where {{seed}} and {{runs}} alone stand for something: double other braces"
        ) from error


def _shorten(node: Any) -> str:
    text = "nothing" if node is None else repr(node)
    return text if len(text) <= 60 else f"{text[:60]}…"


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
