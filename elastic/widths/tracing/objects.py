"""Keep objects that hold traced values in a graph: a program's own ones, and torch's distributions."""

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any


def list_arguments(container: dict[Any, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """List what makes a dictionary of a class of its own again, None where that cannot be told."""
    entries = dict(container)
    args, kwargs = ((), entries) if is_dataclass(container) else ((entries,), dict[str, Any]())
    try:
        replica = type(container)(*args, **kwargs)
    except Exception:  # of a class of the program's own: anything may come
        return None
    is_same = list(replica) == list(entries) and all(replica[name] is entries[name] for name in entries)
    return (args, kwargs) if is_same else None


def make_constructor(kind: type[Any]) -> Callable[..., Any]:
    """Make a function that makes an object of a class from its attributes, and is called as the class is."""

    def make(**attributes: Any) -> Any:
        made = object.__new__(kind)
        vars(made).update(attributes)
        return made

    make.__name__ = kind.__name__
    return make
