"""Say in one line what a user can mend; anything else is a fault of the code and keeps its traceback."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from elastic.errors import ElasticError, cite
from elastic.experiments.tools.composition import explain
from elastic.experiments.tools.signals import Interrupted, raise_on_signals, stop

THEIRS = (ElasticError, OmegaConfBaseException, HydraException, OSError)
FULL = "HYDRA_FULL_ERROR"  # set to 1 it shows tracebacks, as for any program with Hydra
SHORT = "ELASTIC_SHORT_ERRORS"  # says, to processes that are started here, that no user has set the other


class Stop(BaseException):
    """Carry an error out of a job past Hydra, which would print lines of its own."""


@contextmanager
def pass_hydra() -> Iterator[None]:
    """Let what a user can mend leave a job of Hydra's as it is."""
    try:
        yield
    except THEIRS as error:
        raise Stop from error


def run(main: Callable[[], Any]) -> None:
    """Call an entry point; what a user can mend is shown as one line, with exit code 1."""
    is_full = os.environ.get(FULL) == "1" and not os.environ.get(SHORT)
    try:
        with raise_on_signals(), _leave_errors(is_full):
            main()
    except Interrupted as interrupted:
        stop(interrupted)
    except (*THEIRS, Stop) as error:
        cause = error.__cause__ if isinstance(error, Stop) else error
        assert cause is not None
        if isinstance(cause, BrokenPipeError):  # whoever reads the output has enough of it, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would tell at its end
            sys.exit(128 + signal.SIGPIPE)
        if is_full:
            raise cause from cause.__cause__
        rank = int(os.environ.get("LOCAL_RANK", 0))
        prefix = f"process {rank + 1}: " if rank else ""
        print(f"error: {prefix}{format_error(cause)}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _leave_errors(is_full: bool) -> Iterator[None]:
    """Let Hydra raise errors meanwhile, here and in what is started: its own way takes many lines."""
    before = {name: os.environ.get(name, "") for name in (FULL, SHORT)}
    os.environ |= {FULL: "1"} if is_full else {FULL: "1", SHORT: "1"}
    try:
        yield
    finally:
        os.environ |= before


def format_error(error: BaseException) -> str:
    """Format what went wrong as a user would want to read it, in one line."""
    cause = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, HydraException) and (text := explain(cause)):
        return text
    if isinstance(cause, OSError) and cause.filename is not None:
        return _explain_path(cause)
    lines = [line.strip() for line in str(cause).strip().splitlines()]
    shown = " ".join(lines[:2]) if lines and isinstance(cause, HydraException) else cite(cause)
    if cause is not error and not isinstance(cause, ElasticError):
        shown += f" ({str(error).splitlines()[-1]})"
    return shown


def _explain_path(error: OSError) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{error.filename} is no folder, or lies in what is none: name another one"
    return f"{error.filename} cannot be used ({error.strerror}): name another one, or make it so"
