"""One thread a process (xdist runs several side by side) and the same hypothesis examples in every run."""

import gc
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from random import Random

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow all cases of a `sampled` test but so many, drawn by its name: each test draws others."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for name, cases in tests.items():
        count = cases[0].get_closest_marker("sampled").args[0]  # type: ignore[union-attr]
        sample = set(Random(name).sample(range(len(cases)), min(count, len(cases))))
        for i, case in enumerate(cases):
            if i not in sample:
                case.add_marker("slow")


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
