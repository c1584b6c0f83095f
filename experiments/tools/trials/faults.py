"""Let the machine fail a run: each fault is one line, and the run goes on as if nothing had been.

Full and read-only disks are told by what the system would say to each write: no disk is filled.
"""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from elastic.experiments.tools import errors
from elastic.experiments.tools.trials import Part
from elastic.experiments.tools.trials.composing import QUIET, SHORT, compose_run
from elastic.experiments.tools.trials.forks import run_in_fork
from elastic.experiments.tools.trials.moments import Moment, refuse_writes, watch_moments
from elastic.experiments.tools.trials.programs import (
    FOLDER,
    GROWN,
    Program,
    carry_out,
    carry_out_in_two,
    find_difference,
    make_random,
    write_images,
)
from elastic.experiments.train import train

CLAIM = "one line says it, and the run goes on to the same end; clocks and homes do not matter"
YEAR_S = 365 * 24 * 3600
# Of ten trials, how many of each.
KINDS = (*("disk full",) * 5, *("read-only",) * 2, "clock", "worker killed", "process killed")


def try_faults(part: Part, trials: int, random: Random, folder: Path) -> None:
    """Let a small run fail in every way, again and again, and go on with it."""
    seed = random.randrange(1000)
    programs = _make_programs(seed, folder)
    expected = {}
    for name, program in programs.items():
        expected[name] = folder / f"whole-{name}"
        if code := run_in_fork(partial(program.carry_out, expected[name]), folder / "said"):
            part.fail(f"{name}: the run without a fault ends with {code}")
            return
    for trial in range(trials):
        kind = KINDS[trial % len(KINDS)]
        name = {"worker killed": "images", "process killed": "two"}.get(kind, "one")
        place = folder / f"{trial}"
        place.mkdir()
        fault = FAULTS[kind](make_random(seed, kind, trial), place)
        _try_once(part, kind, programs[name], expected[name], place, fault, f"seed {seed}, trial {trial}")
        shutil.rmtree(place, ignore_errors=True)
    for number, (kind, environment, words, ends) in enumerate(ENVIRONMENTS):
        _try_environment(part, kind, environment, words, ends, folder / f"around-{number}")


def _make_programs(seed: int, folder: Path) -> dict[str, Program]:
    words = (*SHORT, *GROWN, "trainer.max_epochs=3", f"seed={seed}")
    images = write_images(folder / "data", seed)
    choices: dict[str, tuple[Any, tuple[str, ...]]] = {
        "one": (carry_out, words),
        "two": (carry_out_in_two, (*words, "trainer.devices=2", "trainer.strategy=ddp")),
        "images": (
            carry_out,
            (*words, *FOLDER, f"data.root={images}"),
        ),
    }
    programs = {}
    for name, (work, options) in choices.items():
        cfg = compose_run(folder, options)
        carried_out = partial(work, train, cfg)
        programs[name] = Program(name, carried_out, [""], lambda place: None)
    return programs


def _try_once(
    part: Part,
    kind: str,
    program: Program,
    expected: Path,
    place: Path,
    fault: Callable[[], None],
    moment: str,
) -> None:
    output = place.with_suffix(".txt")

    def fail() -> None:
        fault()
        errors.run(lambda: program.carry_out(place))

    code = run_in_fork(fail, output)
    outcome = _judge(output.read_text(), code)
    if outcome is None:
        part.fail(f"{kind}, {moment}: it ends with {code} and says {output.read_text()[-200:]}")
        return
    if code and (again := run_in_fork(partial(program.carry_out, place), output)):
        part.fail(f"{kind}, {moment}: it does not go on, {again}: {output.read_text()[-200:]}")
        return
    difference = find_difference(program, expected, place)
    if difference is None:
        part.count(f"{kind}: {outcome}")
    else:
        part.fail(f"{kind}, {moment}: {outcome}, then {difference}")


def _judge(errors_written: str, code: int) -> str | None:
    """Tell how a run with a fault has ended; None where that must not be."""
    if code == 0:
        return "it makes no difference"
    lines = [line for line in errors_written.splitlines() if line.startswith("error: ")]
    is_told = code == 1 and len(lines) == 1 and "Traceback" not in errors_written
    return "one line, and it goes on" if is_told else None


# --- faults, each made in the process that it is to befall ---------------------------------------


def _fill_disk(random: Random, place: Path, number: int = errno.ENOSPC) -> Callable[[], None]:
    count = random.randrange(30)
    return lambda: watch_moments(place, refuse_writes(count, number, random))


def _move_clock(random: Random, place: Path) -> Callable[[], None]:
    """Let the clock jump, several times, back or ahead."""
    jumps = [random.choice((-YEAR_S, -3600, -1, 1, 3600, YEAR_S)) for _ in range(8)]

    def begin() -> None:
        clock, calls = time.time, 0

        def tell() -> float:
            nonlocal calls
            calls += 1
            return clock() + jumps[calls // 3 % len(jumps)]

        time.time = tell

    return begin


def _kill_child(random: Random, place: Path) -> Callable[[], None]:
    """Kill a process that reads batches, or that trains as well, when the run has made some steps."""
    remaining = random.randrange(1, 6)

    def kill(moment: Moment) -> None:
        nonlocal remaining
        if moment.kind == "step":
            remaining -= 1
            if remaining == 0:
                os.kill(random.choice(_list_children()), signal.SIGKILL)

    return lambda: watch_moments(place, kill)


def _list_children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


FAULTS: dict[str, Callable[[Random, Path], Callable[[], None]]] = {
    "disk full": _fill_disk,
    "read-only": partial(_fill_disk, number=errno.EROFS),
    "clock": _move_clock,
    "worker killed": _kill_child,
    "process killed": _kill_child,
}

# --- what is around a command ---------------------------------------------------------------------

# The end, the environment, options, and whether the run has to end well.
ENVIRONMENTS: tuple[tuple[str, dict[str, str], tuple[str, ...], bool], ...] = (
    ("no home", {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}, (), True),
    ("W&B without a network", {"WANDB_API_KEY": "0" * 40}, ("logger=wandb",), True),
    (
        "W&B unreachable",
        {"WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "5"},
        ("logger=wandb", "logger.wandb.offline=false"),
        False,
    ),
)


def _try_environment(
    part: Part, kind: str, environment: dict[str, str], words: tuple[str, ...], ends: bool, folder: Path
) -> None:
    """Carry out a run by its command line, in an environment of its own."""
    with socket.socket() as listener:  # nobody answers there
        listener.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{listener.getsockname()[1]}"
    command = [sys.executable, "-W", "ignore", "-m", "elastic.experiments.train", f"run={folder}"]
    command += [*QUIET, *SHORT, "trainer.max_epochs=1", "schedule=static", *words]
    names = {f"WANDB_{name}_DIR": str(folder) for name in ("CONFIG", "CACHE", "DATA")}
    process = subprocess.run(
        command,
        env={**os.environ, **names, "WANDB_BASE_URL": nowhere, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    outcome = _judge(process.stderr, process.returncode)
    if outcome is None or (process.returncode == 0) is not ends:
        part.fail(f"{kind}: it ends with {process.returncode} and says {process.stderr[-250:]}")
    else:
        part.count(f"{kind}: {outcome if process.returncode else 'it makes no difference'}")
