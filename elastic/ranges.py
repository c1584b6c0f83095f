"""Say beside an option's type and default which values it takes, and refuse any other.

`begin: Part = 0.05` is a number from 0 to 1. `checked` holds a class to what its signature says of numbers;
whoever reads options from outside also asks `fits` whether a value is of the type.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from numbers import Integral, Real
from os import PathLike
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from elastic.errors import OptionError

T = TypeVar("T")
ANYTHING = object()  # in place of a value that is not there yet


@dataclass(frozen=True)
class Range:
    """Bound a number.

    Attributes:
        above, below: whether the least, and the most, are themselves outside.
    """

    least: float = -inf
    most: float = inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        """Tell whether a finite number is within."""
        if not isfinite(value) or (value == self.least and self.above) or (value == self.most and self.below):
            return False
        return self.least <= value <= self.most

    def __str__(self) -> str:
        least = f"{'above' if self.above else 'from'} {self.least:.10g}"
        if self.most < inf:
            return f"{least} {'and below' if self.below else 'to'} {self.most:.10g}"
        return least if self.above else f"{self.least:.10g} or more"


Part = Annotated[float, Range(0, 1)]  # of a run
Fraction = Annotated[float, Range(0, 1, above=True, below=True)]  # of a network
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


def checked(cls: type[T]) -> type[T]:
    """Let a class refuse numbers that are outside the ranges of its signature.

    Raises:
        OptionError: from its constructor, for one that is.
    """
    construct = cls.__init__
    signature = inspect.signature(construct)

    @functools.wraps(construct)
    def construct_checked(self: Any, *args: Any, **kwargs: Any) -> None:
        hints = get_hints(construct)
        for name, value in signature.bind(self, *args, **kwargs).arguments.items():
            if name in hints and _has_range(hints[name]) and not fits(value, hints[name]):
                raise OptionError(explain(name, value, hints[name]))
        construct(self, *args, **kwargs)

    cls.__init__ = construct_checked  # type: ignore[method-assign]
    return cls


def explain(name: str, value: Any, hint: Any) -> str:
    """Word that a value does not fit, and which would."""
    text = {None: "null", True: "true", False: "false"}.get(value) if _is_plain(value) else None
    shown = text or " ".join(f"{value!r}".split())
    return f"{name}={shown if len(shown) <= 60 else shown[:60] + '…'} cannot be: set it to {describe(hint)}"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


@functools.cache
def get_hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the types of a function's arguments, as far as they can be told."""
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # of what is imported for type checkers alone
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of a type, and in its range; numbers are finite, and booleans are none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if value is ANYTHING:
        return True
    if origin is Annotated:
        return fits(value, arguments[0]) and all(
            value in limit for limit in arguments[1:] if isinstance(limit, Range) and _is_number(value)
        )
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if hint in SCALARS:
        return SCALARS[hint][0](value)
    kind = origin or hint
    if not inspect.isclass(kind) or kind is object:
        return True  # a type variable, a new name: nothing that could be told
    if kind is not str and issubclass(kind, Mapping):
        return isinstance(value, Mapping) and all(
            fits(item, arguments[1]) for item in value.values() if arguments
        )
    if issubclass(kind, tuple) and arguments and arguments[-1] is not ...:
        return _is_list(value) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if kind in LISTS or issubclass(kind, LISTS):
        return _is_list(value) and all(fits(item, arguments[0]) for item in value if arguments)
    return kind is not type(None) and _is_instance(value, kind)


def describe(hint: Any) -> str:
    """Describe what fits a type, as `set it to …` goes on."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = " ".join(
            f", {limit}" if str(limit).endswith("more") else f" {limit}" for limit in arguments[1:]
        )
        return describe(arguments[0]) + limits
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, arguments)))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if hint in SCALARS:
        return SCALARS[hint][1]
    kind = origin or hint
    if inspect.isclass(kind) and issubclass(kind, Mapping):
        return "names with a value each"
    if inspect.isclass(kind) and (kind in LISTS or issubclass(kind, LISTS)):
        hints = [argument for argument in arguments if argument is not ...]
        return f"a list, each {describe(hints[0])}" if hints else "a list"
    return f"a part of its own ({getattr(kind, '__name__', kind)})"


def _has_range(hint: Any) -> bool:
    return get_origin(hint) is Annotated or any(_has_range(argument) for argument in get_args(hint))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _is_instance(value: Any, kind: type) -> bool:
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol that cannot be asked
        return not (_is_plain(value) or isinstance(value, str | Real))


LISTS = (list, tuple, set, frozenset, Iterable)
SCALARS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    Any: (lambda value: True, "anything"),
    None: (lambda value: value is None, "null"),
    type(None): (lambda value: value is None, "null"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: isinstance(value, Integral) and not isinstance(value, bool), "a whole number"),
    float: (lambda value: _is_number(value) and isfinite(value), "a number"),
    str: (lambda value: isinstance(value, str) and value != "", "text"),
    PathLike: (lambda value: isinstance(value, str | PathLike), "a path"),
}
