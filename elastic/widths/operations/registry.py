"""Keep the rule of every operation; `register_op` adds one."""

from collections.abc import Callable
from dataclasses import is_dataclass

from torch import fx, nn

from elastic.errors import OptionError
from elastic.widths.operations.interface import Rule

Operation = type[nn.Module] | Callable[..., object] | str

# Functions of these packages are known by their names; one of a user's is meant by itself only.
LIBRARIES = {"elastic", "torch", "torchvision", "_operator", "math"}


# What a subclass may define and still compute as its base does.
HARMLESS = {*dir(object), "__module__", "__annotations__", "__constants__"} - {"__getattribute__"}
HARMLESS |= {"__static_attributes__", "__firstlineno__", "extra_repr", "reset_parameters", "_get_name"}
TENSORS = {"weight", "bias", "running_mean", "running_var"}  # of layers; properties could stand for them


class OperationTable:
    """Know the rule of types of layers (and their subclasses), of functions, and of methods by name."""

    def __init__(self) -> None:
        self.layers: dict[type[nn.Module], Rule] = {}
        self.functions: dict[Callable[..., object], Rule] = {}
        self.names: dict[str, Rule] = {}
        self.leaves: set[type[nn.Module]] = set()
        self.wholes: dict[type[nn.Module], bool] = {}  # what `is_whole` has found

    def find(self, layer: nn.Module | None, node: fx.Node) -> Rule | None:
        """Find the rule of what a node calls, the given layer or a function or method."""
        if layer is not None:
            return next((self.layers[kind] for kind in type(layer).__mro__ if kind in self.layers), None)
        if isinstance(node.target, str):
            return self.names.get(node.target.strip("_"))
        rule = self.functions.get(node.target)
        return rule or self.names.get(_get_name(node.target))


TABLE = OperationTable()


def register_op(operation: Operation, rule: Rule) -> None:
    """Say how an operation carries channels: discovery follows it from now on.

    Args:
        operation: a layer's type, which is then not looked into; a function (one of your own needs
            `torch.fx.wrap`); or the name of a tensor's method.
        rule: takes the tracker and the node, returns the axes of the output; see `elastic.widths.Tracker`.
    """
    if isinstance(operation, type) and issubclass(operation, nn.Module):
        TABLE.layers[operation] = rule
        TABLE.leaves.add(operation)
        TABLE.wholes.clear()
    elif isinstance(operation, str):
        TABLE.names[operation.strip("_")] = rule
    elif callable(operation):
        TABLE.functions[operation] = rule
    else:
        raise OptionError(
            f"{operation!r} is no operation: give a layer's type, a function, or a method's name"
        )


def is_whole(kind: type[nn.Module]) -> bool:
    """Tell whether layers of a type stay whole: those of a registered type, or that compute as their base.

    A subclass computes as its base where it overrides nothing but how it is made and shown.
    """
    if kind not in TABLE.wholes:
        TABLE.wholes[kind] = _computes_as_known(kind)
    return TABLE.wholes[kind]


def _computes_as_known(kind: type[nn.Module]) -> bool:
    known = (*TABLE.leaves, *(base for base in TABLE.layers if base.__module__.startswith("torch.nn.")))
    base = next((base for base in kind.__mro__ if base in known), None)
    if base is None:
        return False
    own = {name for ancestor in kind.__mro__[: kind.__mro__.index(base)] for name in vars(ancestor)}
    return own.isdisjoint({*dir(base), *TENSORS} - HARMLESS)


def _get_name(function: Callable[..., object]) -> str:
    """Get the name by which a function of the libraries is known, or what holds a model's outputs."""
    if isinstance(function, type) and (is_dataclass(function) or hasattr(function, "_fields")):
        return "dataclass"
    return getattr(function, "__name__", "").strip("_") if _is_library(function) else ""


def _is_library(function: Callable[..., object]) -> bool:
    """Tell whether a function is one of torch and its kin; built-in ones of torch name no module."""
    return (getattr(function, "__module__", None) or "torch").partition(".")[0] in LIBRARIES
