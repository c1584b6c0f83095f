"""Kill programs at any moment, and inside their writes: each goes on and ends as if it had not been killed.

What a kill leaves is a folder, and files are written by one process. So the folder is copied at each such
moment of a run that is not killed, and each copy is gone on with; a part of the trials kills processes.
"""

import shutil
import signal
from functools import partial
from pathlib import Path
from random import Random

from elastic.experiments.tools.trials import Part
from elastic.experiments.tools.trials.forks import run_in_fork
from elastic.experiments.tools.trials.moments import (
    Watch,
    copy_moments,
    digest_folder,
    kill_at,
    watch_moments,
)
from elastic.experiments.tools.trials.programs import (
    Program,
    Train,
    find_difference,
    make_programs,
    make_random,
)

CLAIM = "the continued run is, bit for bit, the one that was never killed"
MOST = 45  # trials of one run, before the next is drawn
DEAR = (
    "read by a process",
    "two processes",
    "sweep",
)  # a trial costs as much as several others
KILLED = 0.1  # of the trials that end a process


def try_kills(part: Part, trials: int, random: Random, train: Train, folder: Path) -> None:
    """Kill each program as often as the others, and compare what continues it.

    Args:
        train: carries out a configuration in a folder, from the start or from its checkpoint.
    """
    seed = random.randrange(1000)
    while part.trials < trials:
        programs = make_programs(train, seed, folder)
        for index, program in enumerate(programs.values()):
            share = -(-(trials - part.trials) // (len(programs) - index))  # of what is left
            maximum = MOST // 2 if program.name in DEAR else MOST
            if share > 0:
                place = folder / f"{seed}-{index}"
                try_program(part, program, min(share, maximum), seed, place)
                shutil.rmtree(place, ignore_errors=True)
        seed += 1


def try_program(part: Part, program: Program, trials: int, seed: int, folder: Path) -> None:
    """Kill a program at different moments; folders that are alike are gone on with once."""
    random = make_random(seed, program.name)
    expected, copies = folder / "whole", folder / "copies"
    watch = copy_moments(expected, copies, random)
    expected.mkdir()
    if run_in_fork(partial(_watch, program, expected, watch)):
        part.fail(f"{program.name}, seed {seed}: the run that is not killed fails")
        return
    if fault := program.fault(expected):
        part.fail(f"{program.name}, seed {seed}: {fault}")
        return
    moments = sorted(copies.iterdir())
    killed = max(1, round(trials * KILLED)) if trials > 2 else 0
    for trial in range(killed):
        times = random.choice((1, 1, 2))
        ends = [random.randrange(max(1, len(moments) // times)) for _ in range(times)]
        broken = folder / f"killed-{trial}"
        broken.mkdir()
        kills = sum(
            run_in_fork(partial(_watch, program, broken, kill_at(end, random))) == -signal.SIGKILL
            for end in ends
        )
        _go_on(
            part, program, expected, broken, f"killed {'twice' if kills > 1 else 'once'}", f"{seed}, {ends}"
        )
    random.shuffle(moments)
    digests: set[str] = set()
    for moment in moments:
        digest = digest_folder(moment)
        if len(digests) < trials - killed and digest not in digests:
            digests.add(digest)
            _go_on(part, program, expected, moment, "left as by a kill", f"{seed}, moment {moment.name}")
        shutil.rmtree(moment, ignore_errors=True)


def _watch(program: Program, folder: Path, watch: Watch) -> None:
    watch_moments(folder, watch)
    program.carry_out(folder)


def _go_on(part: Part, program: Program, expected: Path, broken: Path, kind: str, moment: str) -> None:
    code = run_in_fork(partial(program.carry_out, broken))
    difference = f"it does not end, {code}" if code else find_difference(program, expected, broken)
    if difference is None:
        part.count(f"{program.name}, {kind}: the same")
    else:
        part.fail(f"{program.name}, {kind}, seed {moment}: {difference}")
    shutil.rmtree(broken, ignore_errors=True)
