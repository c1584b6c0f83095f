"""End at once on SIGTERM and Ctrl-C, wherever a command is: what it has written stays whole, a line says so.

Only what Python brings is imported here, so that a command can be stopped while it imports.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE_S = 10.0  # until a signal is sent again, should something have swallowed it
AGAIN = "start the same command again"
_advice: list[Callable[[], str]] = []


class Interrupted(BaseException):
    """Carry a signal out of whatever is being done."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.arrival = threading.Event()


def end_on_signals() -> None:
    """End this process on a signal, without more ado, while there is nothing to put in order."""
    for number in SIGNALS:
        signal.signal(number, _end)


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `Interrupted` on a signal meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _raise) for number in SIGNALS}
    _advice.clear()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_raising() -> None:
    """Raise on SIGTERM again where a library has put a handler of its own in place."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _raise:
        signal.signal(signal.SIGTERM, _raise)


def advise(advice: Callable[[], str]) -> None:
    """Say from now on how to go on after a signal."""
    _advice[:] = [advice]


def stop(interrupted: Interrupted) -> NoReturn:
    """Say that a signal has ended the command, and how to go on, and exit as a shell has it."""
    interrupted.arrival.set()
    number = interrupted.number
    for ignored in SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the first process speaks for all
        print(describe(number), file=sys.stderr, flush=True)
    sys.exit(128 + number)


def describe(number: int) -> str:
    """Describe what has ended the command, and how to go on."""
    return f"stopped by {signal.Signals(number).name}: {describe_next()}"


def describe_next() -> str:
    """Describe how to go on."""
    return _advice[0]() if _advice else AGAIN


def follow_parent() -> None:
    """End this process when the one that has started it does."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _end(number: int, frame: FrameType | None) -> None:
    print(describe(number), file=sys.stderr, flush=True)
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> None:
    interrupted = Interrupted(number)
    threading.Thread(target=_repeat, args=(interrupted,), daemon=True).start()
    raise interrupted


def _repeat(interrupted: Interrupted) -> None:
    """Send a signal once more: an exception that comes in a destructor, say, is lost."""
    if not interrupted.arrival.wait(PATIENCE_S):
        os.kill(os.getpid(), interrupted.number)
