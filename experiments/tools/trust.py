"""Say what a configuration that comes from a file may name: what it names is imported and called.

What a command line names is its user's own choice. A recorded configuration may come from anybody.
"""

import inspect
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchvision.datasets import VisionDataset
from torchvision.models import list_models

from elastic.errors import FileError
from elastic.training.tasks import Task

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
# What a string may take from elsewhere: the run's folder, and a variable of the environment.
INTERPOLATIONS = re.compile(r"\$\{run\}|\$\{oc\.env:\w+(,[^${}]*)?\}")
GETTERS = ("hydra.utils.get_class", "hydra.utils.get_method", "hydra.utils.get_object")  # of a trusted `path`
LIGHTNING = (
    *(L.Trainer, L.Callback, Logger, Profiler, Strategy, Accelerator, Precision, CheckpointIO, LayerSync),
    ClusterEnvironment,
)
# Classes may be named if they are defined in the first and derive from one of the second.
CLASSES: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("elastic.callbacks", (L.Callback,)),
    ("elastic.data", (object,)),
    ("elastic.growth", (object,)),
    ("elastic.pruning.budget", (object,)),
    ("elastic.training.checkpoints", (CheckpointIO,)),
    ("elastic.training.schedules", (LRScheduler,)),
    ("elastic.training.tasks", (Task,)),
    ("torch.optim", (torch.optim.Optimizer, LRScheduler, ReduceLROnPlateau)),
    ("lightning", LIGHTNING),
    ("torchvision.datasets", (VisionDataset,)),
    ("torchvision.transforms", (object,)),
    ("torchvision.models", (nn.Module,)),
)
TEACHER = "elastic.experiments.tools.restore.restore_teacher"  # which reads a recorded configuration itself
_modules: set[str] = set()  # that the user of this process trusts


def trust_modules(names: Iterable[str]) -> None:
    """Let recorded configurations name whatever is in these modules and packages, in this process."""
    _modules.update(names)


def check_trust(raw: Any, file: Path) -> None:
    """Refuse a recorded configuration that names what it may not, before anything of it is imported.

    Args:
        raw: the file's plain containers, interpolations as they are written.

    Raises:
        FileError: it does, or computes what it names.
    """
    for node in _iterate_nodes(raw):
        if isinstance(node, str) and "${" in INTERPOLATIONS.sub("", node):
            raise FileError(f"{file} computes {_shorten(node)}: write down what it comes to")
        if isinstance(node, dict) and "_target_" in node:
            name = node["_target_"]
            named = node.get("path") if name in GETTERS else name
            if not is_trusted(named):
                raise FileError(
                    f"{file} names {_shorten(named)}, which would be called and is none of this package's: "
                    f"if you know what it does, add trust=[{str(named).partition('.')[0][:40]}]"
                )


def is_trusted(name: Any) -> bool:
    """Tell whether a recorded configuration may name a class or a function."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return False
    if name == TEACHER or any(name.startswith(f"{module}.") for module in _modules):
        return True
    roots = {package.partition(".")[0] for package, _ in CLASSES}
    if name.partition(".")[0] not in roots:  # importing it would run it
        return False
    try:
        obj = find_object(name)
    except ImportError:
        return False
    package = getattr(obj, "__module__", None) or ""
    if inspect.isclass(obj):
        return any(_is_within(package, home) and issubclass(obj, bases) for home, bases in CLASSES)
    if not inspect.isfunction(obj):
        return False
    # Of torchvision, builders alone: others read what they are told to.
    is_builder = _is_within(package, "torchvision.models") and obj.__name__ in list_models()
    return is_builder or _is_within(package, "elastic.models")


def find_object(name: str) -> Any:
    """Find what a dotted name stands for, without a word where there is nothing.

    Raises:
        ImportError: there is nothing, or its module cannot be imported.
    """
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:count])
        try:
            obj = import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
                continue  # a class, perhaps, of the module above
            raise
        for part in parts[count:]:
            if not hasattr(obj, part):
                raise ImportError(f"{module_name} has no {'.'.join(parts[count:])}")
            obj = getattr(obj, part)
        return obj
    raise ImportError(f"there is no module {parts[0]}")


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _iterate_nodes(node: Any) -> Iterator[Any]:
    """Iterate over a configuration's nodes, keys and values, however deep."""
    yield node
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from _iterate_nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from _iterate_nodes(value)


def _shorten(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:80]}…"
