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
HARMLESS |= {"_check_input_dim"}  # which refuses inputs, and changes none
TENSORS = {"weight", "bias", "running_mean", "running_var"}  # of layers; properties could stand for them


class OperationTable:
    """Know the rule of types of layers (and their subclasses), of functions, and of methods by name."""

    def __init__(self) -> None:
        self.layers: dict[type[nn.Module], Rule] = {}
        self.functions: dict[Callable[..., object], Rule] = {}
        self.names: dict[str, Rule] = {}
        self.leaves: set[type[nn.Module]] = set()
        self.bases: dict[type[nn.Module], type[nn.Module] | None] = {}  # what `find_base` has found

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
        TABLE.bases.clear()
    elif isinstance(operation, str):
        TABLE.names[operation.strip("_")] = rule
    elif callable(operation):
        TABLE.functions[operation] = rule
    else:
        raise OptionError(
            f"{operation!r} is no operation: give a layer's type, a function, or a method's name"
        )


def find_base(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Find the type, torch's or a registered one, that layers of a type compute as: they stay whole.

    A subclass computes as its base where it overrides nothing but how it is made and shown.
    """
    if kind not in TABLE.bases:
        TABLE.bases[kind] = _find_base(kind)
    return TABLE.bases[kind]


def _find_base(kind: type[nn.Module]) -> type[nn.Module] | None:
    kinds = (*TABLE.leaves, *(base for base in TABLE.layers if base.__module__.startswith("torch.nn.")))
    base = next((base for base in kind.__mro__ if base in kinds), None)
    if base is None:
        return None
    own = {name for ancestor in kind.__mro__[: kind.__mro__.index(base)] for name in vars(ancestor)}
    return base if own.isdisjoint({*dir(base), *TENSORS} - HARMLESS) else None


def _get_name(function: Callable[..., object]) -> str:
    """Get the name by which a function of the libraries is known, or what holds a model's outputs."""
    if isinstance(function, type) and _is_container(function):
        return "dataclass"
    library, name = _find_library(function), getattr(function, "__name__", "")
    is_helper = library == "torchvision" and name.startswith("_")
    return name.strip("_").removeprefix("special_") if library in LIBRARIES and not is_helper else ""


def _is_container(kind: type) -> bool:
    return is_dataclass(kind) or hasattr(kind, "_fields") or issubclass(kind, dict)


def _find_library(function: Callable[..., object]) -> str:
    """Find the package that a function is from; built-in ones of torch name no module."""
    return (getattr(function, "__module__", None) or "torch").partition(".")[0]
