"""Tell Lightning's classes by either name that its package has: `lightning.pytorch` or `pytorch_lightning`.

A program may import either, and their classes are others to Python.
"""

from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import TypeIs

T = TypeVar("T")
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def find_base(value: object, kind: type) -> Any:
    """Find a class of Lightning's among the bases of a value, in whose package it may be another; or None."""
    return next((base for base in type(value).__mro__ if _name(base) == _name(kind)), None)


def is_kind(value: object, kind: type[T]) -> TypeIs[T]:
    """Tell whether a value is of a class of Lightning's, whichever package it comes from."""
    return find_base(value, kind) is not None


def overrides(module: L.LightningModule, hook: str) -> bool:
    """Tell whether a module has a hook of its own."""
    return is_overridden(hook, module, find_base(module, L.LightningModule))


def _name(kind: type) -> str:
    """Name a class within its package."""
    module = kind.__module__
    for package in PACKAGES:
        module = module.removeprefix(package)
    return f"{module}.{kind.__qualname__}"
