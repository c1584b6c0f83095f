"""Reach the tensors in what batches and outputs are made of: containers, those of users' own classes, too."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves, tree_map


def iterate_leaves(value: Any) -> Iterator[Any]:
    """Iterate over what nested containers hold: tuples, lists, mappings, dataclasses and distributions."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Mapping):
            yield from iterate_leaves(list(leaf.values()))
        elif _is_instance(leaf):
            yield from iterate_leaves([getattr(leaf, field.name) for field in fields(leaf)])
        elif isinstance(leaf, Distribution):
            yield from iterate_leaves(list(vars(leaf).values()))
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
    if _is_instance(leaf):
        replica = copy.copy(leaf)
        for field in fields(leaf):
            object.__setattr__(replica, field.name, replace_tensors(getattr(leaf, field.name), replace))
        return replica
    return leaf


def _is_instance(value: Any) -> bool:
    """Tell whether a value is an instance of a dataclass, not one itself."""
    return is_dataclass(value) and not isinstance(value, type)
