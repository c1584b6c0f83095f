"""Let `int(x.shape[1] / 2)` be traced: Python insists on a number there, which would follow no channels.

It takes no other value from `__int__`, so the functions that make up a forward find another `int` meanwhile.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from elastic.widths.functions import list_contents
from elastic.widths.tracing.proxies import Asked

if TYPE_CHECKING:
    from elastic.widths.tracing.concrete import ConcreteTracer

NAME = int.__name__
METHODS = (MethodType, staticmethod, classmethod)
Namespace = dict[str, Any]


class _Kind(type):
    """Make whole numbers as `int` does, but for traced ones; where it stands for a type, be `int`."""

    tracer: "ConcreteTracer"

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and issubclass(type(args[0]), Asked):
            value = cls.tracer.find(args[0].node)
            if isinstance(value, int):
                return args[0]
            if isinstance(value, float):
                return cls.tracer.create_proxy("call_function", int, args, {})
        return int(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, int)


@contextmanager
def trace_integers(tracer: "ConcreteTracer", namespaces: Sequence[Namespace]) -> Iterator[None]:
    """Let the functions of some namespaces call `int` with traced numbers."""
    changed = [namespace for namespace in namespaces if NAME not in namespace]
    stand_in = _Kind(NAME, (), {"tracer": tracer})
    try:
        for namespace in changed:
            namespace[NAME] = stand_in
        yield
    finally:
        for namespace in changed:
            del namespace[NAME]


def find_namespaces(model: nn.Module) -> list[Namespace]:
    """Find the global variables of all functions that call `int` and that a model's forwards may call."""
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    values = [value for kind in kinds if not _is_known(kind) for value in vars(kind).values()]
    values += [value for module in model.modules() for value in vars(module).values()]
    namespaces: dict[int, Namespace] = {}
    for function in _list_functions(values):
        if NAME in _list_names(function.__code__):
            namespaces[id(function.__globals__)] = function.__globals__
    return list(namespaces.values())


def _list_functions(values: Iterable[Any]) -> Iterator[FunctionType]:
    """List the functions among values, and all that they call by name or hold, each once."""
    visited, pending = set[int](), list(values)
    while pending:
        value = pending.pop()
        function = value.__func__ if isinstance(value, METHODS) else value
        if not isinstance(function, FunctionType) or id(function) in visited or _is_known(function):
            continue
        visited.add(id(function))
        yield function
        called = [function.__globals__.get(name) for name in _list_names(function.__code__)]
        pending += [*called, *list_contents(function), vars(function).get("__wrapped__")]


def _list_names(code: CodeType) -> set[str]:
    """List the names that code asks for, with that of the functions in it."""
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*map(_list_names, inner))


def _is_known(value: Any) -> bool:
    """Tell whether a class or a function is of a library whose own calls of `int` are to stay as they are."""
    return (value.__module__ or "").partition(".")[0] in ("torch", "numpy", "builtins")
