"""Do work in forks of this process, which has everything imported: a trial costs what it does, no more."""

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 120


def fork(work: Callable[[], Any], output: str | Path = os.devnull, patience_s: int = PATIENCE_S) -> int:
    """Begin work in a child process, the first of a group of its own, and return its number.

    Args:
        output: the file that what it says goes to.
        patience_s: until a child that hangs is ended by a signal.
    """
    gc.freeze()  # or the child's collector would write to, and so copy, all memory
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        signal.alarm(patience_s)
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """Wait for a child to end, and return its exit code: below zero the signal that has killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run_in_fork(work: Callable[[], Any], output: str | Path = os.devnull) -> int:
    """Do work in a child process, and return its exit code; see `fork`."""
    return wait(fork(work, output))
