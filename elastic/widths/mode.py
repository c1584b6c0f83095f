"""Bring the modules of a model into a mode, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def set_mode(model: M, training: bool = False) -> M:
    """Bring a model into a mode, and return it: a `train` of its own may return nothing."""
    model.train(training)
    return model


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Bring each module back into the mode it was in, whatever happens: some may be frozen."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
