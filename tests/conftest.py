"""One thread a process (xdist runs several side by side) and the same hypothesis examples in every run."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """A run makes the CPU flush denormals, for good: undo it, since hypothesis draws them."""
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)
