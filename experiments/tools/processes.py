"""Let the processes of a run end together, and say why."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import lightning as L
from lightning.pytorch.strategies.launchers import (
    _MultiProcessingLauncher,
    _SubprocessScriptLauncher,
    subprocess_script,
)

from elastic.experiments.tools.signals import describe_next

PERIOD_S = 0.2
PATIENCE_S = 5.0  # for this process to hear of it by itself, and to say so: it does unless it waits for them


def starts_others(trainer: L.Trainer) -> bool:
    """Tell whether this process starts the others of its run, as itself and by its own command."""
    return isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)


def forks_others(trainer: L.Trainer) -> bool:
    """Tell whether the trainer makes processes that keep their results to themselves."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def speak_for_others() -> None:
    """Let a process that starts others say how they have ended: Lightning kills all, without a word."""
    assert hasattr(subprocess_script, "_launch_process_observer")
    subprocess_script._launch_process_observer = _observe  # type: ignore[assignment]


def watch_processes(processes: Sequence[int]) -> None:
    """End this process, with a line, when one of others fails and it does not notice: it may wait for ever.

    Systems that cannot tell of an end without taking it from others, macOS up to Python 3.12 and Windows,
    have no such watch.

    Args:
        processes: the numbers of the second process on, children of this one.
    """
    if not hasattr(os, "waitid"):
        return

    def watch() -> None:
        remaining = dict(enumerate(processes, 1))
        while remaining:
            time.sleep(PERIOD_S)
            for rank, number in list(remaining.items()):
                try:
                    end = os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                except ChildProcessError:  # whoever has started it has heard of its end
                    del remaining[rank]
                    continue
                if end is None:
                    continue
                del remaining[rank]
                if end.si_code != os.CLD_EXITED or end.si_status:
                    _end(rank, end, processes)

    threading.Thread(target=watch, daemon=True).start()


def _observe(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    watch_processes([child.pid for child in children])


def _end(rank: int, end: "os.waitid_result", processes: Sequence[int]) -> NoReturn:
    time.sleep(PATIENCE_S)
    by_code = end.si_code == os.CLD_EXITED
    cause = f"with exit code {end.si_status}" if by_code else f"by {signal.Signals(end.si_status).name}"
    print(
        f"error: process {rank + 1} of {len(processes) + 1} has ended {cause}: {describe_next()}",
        file=sys.stderr,
        flush=True,
    )
    for number in processes:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    os._exit(1)
