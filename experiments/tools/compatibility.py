"""Let packages that this one needs run with versions of Python that are newer than they are."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PARSER: Any = argparse.ArgumentParser


@contextmanager
def let_hydra_start() -> Iterator[None]:
    """Let argparse check the help of an option only where it is text.

    From Python 3.14 on it checks all, as options are added. One of Hydra 1.3's is not text until it is shown.
    """
    check = getattr(PARSER, "_check_help", None)
    if check is None:
        yield
        return
    PARSER._check_help = lambda parser, action: isinstance(action.help, str) and check(parser, action)
    try:
        yield
    finally:
        PARSER._check_help = check
