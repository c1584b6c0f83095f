"""One thread a process (xdist runs several side by side) and the same hypothesis examples in every run."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """Spare the garbage collector what has been imported: looking through it took a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def no_picture() -> Iterator[None]:
    """Leave out the picture of a run's history: it takes as long as the run, and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        if train := sys.modules.get("elastic.experiments.train"):
            patch.setattr(train, "draw_history", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """A run makes the CPU flush denormals, for good: undo it, since hypothesis draws them."""
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def cores() -> Iterator[None]:
    """`experiments.serve` keeps its process to one core, for good: undo it, or later tests share that one."""
    held = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    yield
    if held is not None:
        os.sched_setaffinity(0, held)
