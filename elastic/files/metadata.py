"""Take what a file's metadata says of its network, and refuse what cannot be: anybody may have written it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from elastic.errors import FileError, OptionError
from elastic.models.builders import build_model
from elastic.widths.inputs import Example, make_zeros

HEAD = re.compile(r"\.kams\.0\..*\.heads\.(\d+)\.")  # the set of a module of the smallest level


def build_network(about: Mapping[str, Any], path: Path) -> nn.Module:
    """Build a network as it was first built, by the builder and the options that a file says.

    Raises:
        FileError: it says none, or what cannot be.
    """
    if not isinstance(about.get("model"), dict):
        raise FileError(
            f"{path} does not say how its network is built: give the network as it was first built"
        )
    try:
        return build_model(about["model"])
    except OptionError as error:
        raise FileError(f"{path}: {error}") from error


def make_example(about: Mapping[str, Any], path: Path) -> Example:
    """Make an input of the size that a file says: zeros.

    Raises:
        FileError: it says none, or one that cannot be.
    """
    if "input" not in about:
        raise FileError(f"{path} does not say the size of its input: give an example, batch first")
    try:
        return make_zeros(about["input"], 1)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # no sizes, or too large ones
        raise FileError(
            f"{path} says that its input is {about['input']}: give an example, batch first"
        ) from error


def read_levels(about: Mapping[str, Any], path: Path) -> list[dict[str, int]]:
    """Read the sizes of levels, of the right type; whether a network can have them is seen later.

    Raises:
        FileError: they are of another type.
    """
    levels = about["levels"]
    are_levels = isinstance(levels, list) and all(isinstance(level, dict) for level in levels)
    if not are_levels or any(type(n) is not int or n < 1 for level in levels for n in level.values()):
        raise FileError(f"{path} says of its levels what cannot be: train again or restore it")
    return list(levels)


def read_modules(about: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Read how kernel activation modules are made, of as many sets as a file has tensors of.

    Raises:
        FileError: it has others, or what it says is of another type.
    """
    modules = about["switched"]
    heads = {match[1] for name in tensors if (match := HEAD.match(name))}
    fits = isinstance(modules, dict) and type(modules.get("sets")) is int and len(heads) == modules["sets"]
    names = modules.get("names") or [] if fits else []
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not fits or not are_names or not all(isinstance(modules.get(key), str) for key in ("kind", "choice")):
        raise FileError(f"{path} says of its modules what its tensors do not: train again or restore it")
    return dict(modules)
