"""Note what a forward reads in its modules beside tensors: it is constant in a trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn
from torch.utils._pytree import tree_leaves

from elastic.widths.copying import ATOMS
from elastic.widths.hooks import INTERNAL
from elastic.widths.tracing.sizes import SizeAttribute

PLAIN = {*ATOMS, SizeAttribute}
CONTAINERS = {tuple, list, dict}
MISSING = object()
MODE = "training"
CONSTANT = "_tensor_constant"  # what torch.fx calls a tensor that the model's forward makes


class Attribute(NamedTuple):
    """Name an attribute of a module."""

    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}.{self.name}".lstrip(".")


class Constants(NamedTuple):
    """Say what a forward has done with the numbers, flags and texts that modules hold.

    Attributes:
        reads: the attributes that it has read, and not changed.
        counts: the numbers that it has read and changed, and what they are behind it.
        modes: the paths of the modules of which it has asked whether they are in training.
    """

    reads: set[Attribute]
    counts: dict[Attribute, int | float]
    modes: set[str]


@contextmanager
def note_constants(model: nn.Module) -> Iterator[Constants]:
    """Note which numbers, flags and texts of its modules a forward reads while it is traced."""
    constants = Constants(set(), {}, set())
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    values: dict[Attribute, tuple[Any, str]] = {}
    outer = vars(nn.Module).get("__getattribute__")
    read = outer or object.__getattribute__

    def note(module: nn.Module, name: str) -> Any:
        value = read(module, name)
        if name == MODE and id(module) in paths:
            constants.modes.add(paths[id(module)])
        elif name not in INTERNAL and id(module) in paths:
            attribute = Attribute(paths[id(module)], name)
            if attribute not in values and name in read(module, "__dict__") and _is_plain(value):
                values[attribute] = value, repr(value)
        return value

    setattr(nn.Module, "__getattribute__", note)  # noqa: B010
    try:
        yield constants
    finally:
        if outer is None:
            delattr(nn.Module, "__getattribute__")
        else:
            setattr(nn.Module, "__getattribute__", outer)  # noqa: B010
    for attribute, (value, text) in values.items():
        current = vars(modules[attribute.path]).get(attribute.name, MISSING)
        if current is value and repr(current) == text:
            constants.reads.add(attribute)
        elif type(value) in (int, float, SizeAttribute) and type(current) in (int, float):
            constants.counts[attribute] = current


def _is_plain(value: Any) -> bool:
    """Tell whether a value is a number, a flag, a text or nothing, or consists of these."""
    return all(type(leaf) in PLAIN for leaf in (tree_leaves(value) if type(value) in CONTAINERS else [value]))
