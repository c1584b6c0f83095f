"""Reach the tensors in what batches and outputs are made of: containers, objects of users' own classes."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves, tree_map


def iterate_leaves(value: Any) -> Iterator[Any]:
    """Iterate over what nested containers hold: tuples, lists, mappings, and objects with tensors."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Mapping):
            yield from iterate_leaves(list(leaf.values()))
        elif attributes := _get_attributes(leaf):
            yield from iterate_leaves(list(attributes.values()))
        else:
            yield leaf


def list_tensors(value: Any) -> list[Tensor]:
    """List the tensors that nested containers hold."""
    return [leaf for leaf in iterate_leaves(value) if isinstance(leaf, Tensor)]


def list_versions(value: Any) -> list[int]:
    """List how often each tensor that nested containers hold has been written to."""
    return [tensor._version for tensor in list_tensors(value)]


def replace_tensors(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """Return nested containers with other tensors in the places of theirs."""
    return tree_map(partial(_replace_leaf, replace), value)


def _replace_leaf(replace: Callable[[Tensor], Tensor], leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return replace(leaf)
    if isinstance(leaf, Mapping):
        replica: Any = copy.copy(leaf)
        for name, part in leaf.items():
            replica[name] = replace_tensors(part, replace)
        return replica
    if attributes := _get_attributes(leaf):
        replica = copy.copy(leaf)
        for name, part in attributes.items():
            object.__setattr__(replica, name, replace_tensors(part, replace))
        return replica
    return leaf


def _get_attributes(value: Any) -> dict[str, Any]:
    """Get what an object holds: all of a dataclass's fields, of others' attributes those with tensors."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Tensor | nn.Module | type):
        return {}
    return {name: part for name, part in getattr(value, "__dict__", {}).items() if _holds_tensors(part)}


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor | Distribution) for leaf in tree_leaves(value))
