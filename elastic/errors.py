"""Say what is wrong that a user can mend, one class a kind of mistake: each message is one line.

It names the thing and the remedy. Anything else that is raised is a fault of the code.
"""

import re

COLOUR = re.compile("\x1b\\[[0-9;]*m")


class ElasticError(Exception):
    """Say, on one line, what is wrong and what to do: the base of all errors that a user can mend."""


class StructureError(ElasticError, ValueError):
    """Refuse a model, or a change of it, that cannot be followed."""


class OptionError(ElasticError, ValueError):
    """Refuse an option's value that cannot be."""


class DataError(ElasticError, RuntimeError):
    """Refuse data that cannot be used."""

    def __init__(self, message: str) -> None:
        # A loader's worker process hands its whole traceback over as the message; the last line is the error.
        last = message.strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"{DataError.__module__}.DataError: "))


class FileError(ElasticError, RuntimeError):
    """Refuse a file, or the folder of a run, that is missing, damaged, or of something else."""


class TrainingError(ElasticError, RuntimeError):
    """Refuse a run that cannot begin, or end one that cannot go on."""


class BusyError(TrainingError):
    """Refuse a run in whose folder another process trains."""


class SweepError(TrainingError):
    """End a sweep of which no run can be done."""


def cite(error: BaseException) -> str:
    """Cite the first line of what others' code says, without colours, or the name of its error."""
    lines = COLOUR.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
