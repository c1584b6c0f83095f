"""What can go wrong that a user can mend, one class a kind of mistake: each message is one line.

It names the thing and the remedy. Anything else that is raised is a fault of the code.
"""


class ElasticError(Exception):
    """The base of all errors that a user can mend."""


class StructureError(ElasticError, ValueError):
    """A model, or a change of it, that cannot be followed; says which part and what to do."""


class OptionError(ElasticError, ValueError):
    """An option with a value that cannot be."""


class DataError(ElasticError, RuntimeError):
    """Data that cannot be used."""

    def __init__(self, message: str) -> None:
        # A loader's worker process hands its whole traceback over as the message; the last line is the error.
        last = message.strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"{DataError.__module__}.DataError: "))


class FileError(ElasticError, RuntimeError):
    """A file, or the folder of a run, that is missing, damaged, or of something else."""


class TrainingError(ElasticError, RuntimeError):
    """A run that cannot begin, or cannot go on."""


class BusyError(TrainingError):
    """Another process trains in the run's folder."""


class SweepError(TrainingError):
    """None of a sweep's runs can be done."""
