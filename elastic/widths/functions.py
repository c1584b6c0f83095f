"""Copy functions that hold parts of a model, such as a forward that a program has put in a layer's place."""

from collections.abc import Container
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def list_contents(function: FunctionType) -> list[Any]:
    """List what a function holds of the scope in which it was made, and as defaults of its arguments."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return [*cells, *(function.__defaults__ or ())]


def holds_part(value: Any, parts: Container[int], seen: frozenset[int] = frozenset()) -> bool:
    """Tell whether a value is one of some modules, a method of one, or a function that holds one.

    Args:
        parts: the identities of the modules.
        seen: those of functions that are being asked.
    """
    if isinstance(value, nn.Module):
        return id(value) in parts
    if isinstance(value, MethodType):
        return id(value.__self__) in parts
    if not isinstance(value, FunctionType) or id(value) in seen:
        return False
    seen |= {id(value)}
    return any(holds_part(content, parts, seen) for content in list_contents(value))


def copy_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Copy a function that holds a part of a model, such that it holds that of the copy.

    Args:
        memo: what stands in the copy for the model's parts, by their identity.
    """
    if id(function) in memo or not holds_part(function, memo):
        return memo.get(id(function), function)  # type: ignore[no-any-return]
    pairs = [(cell, CellType()) for cell in function.__closure__ or ()]
    closure = tuple(new if _is_filled(old) else old for old, new in pairs)
    replica = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
    memo[id(function)] = replica  # which it may hold itself
    for old, new in pairs:
        if _is_filled(old):
            new.cell_contents = _copy_content(old.cell_contents, memo)
    if function.__defaults__ is not None:
        replica.__defaults__ = tuple(_copy_content(value, memo) for value in function.__defaults__)
    replica.__kwdefaults__ = function.__kwdefaults__
    vars(replica).update(vars(function))
    return replica


def _copy_content(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, FunctionType):
        return copy_function(value, memo)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, memo.get(id(value.__self__), value.__self__))
    return memo.get(id(value), value) if isinstance(value, nn.Module) else value


def _is_filled(cell: CellType) -> bool:
    """Tell whether a variable of a closure has a value yet."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
