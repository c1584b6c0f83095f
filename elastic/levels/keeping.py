"""Let a program find in its network's modules what the forward of a level keeps there, for a loss, say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from elastic.levels.settings import pair_modules
from elastic.widths.hooks import INTERNAL, list_containers

Owner = dict[str, Any]  # the attributes of a module, or a dictionary among them


@contextmanager
def keep_in(net: nn.Module, level: nn.Module) -> Iterator[None]:
    """Keep in the network what a level keeps meanwhile in attributes, lists and dictionaries of its modules.

    That is what has a gradient; all else, such as caches, is each one's own. A list holds before what the
    network's does: whether the forward empties it, or the program does, it has the same entries behind.
    """
    lists = _pair_lists(net, level)
    for entries, level_entries in lists:
        level_entries[:] = entries
    owners = [(owner, part, dict(part)) for owner, part in _pair_owners(net, level)]
    yield
    for owner, part, before in owners:
        owner.update({name: part[name] for name in _find_kept(part, before)})
    for entries, level_entries in lists:
        if all(map(_has_gradient, level_entries)):
            entries[:] = level_entries
            level_entries.clear()


@contextmanager
def forget(level: nn.Module) -> Iterator[None]:
    """Take back what a forward keeps in lists and dictionaries meanwhile, where it has a gradient."""
    contents = [(value, value.copy()) for value in list_containers(level)]
    try:
        yield
    finally:
        for value, content in contents:
            if isinstance(value, dict):
                _take_back(value, content)
            elif any(map(_has_gradient, value)):
                value[:] = content


def _take_back(value: Owner, content: Owner) -> None:
    """Bring the entries of a dictionary back that have been given something with a gradient."""
    for name in _find_kept(value, content):
        if name in content:
            value[name] = content[name]
        else:
            del value[name]


def _pair_lists(net: nn.Module, level: nn.Module) -> list[tuple[list[Any], list[Any]]]:
    """Pair the lists of both that hold nothing without a gradient."""
    pairs = [
        (value, vars(part).get(name))
        for module, part in pair_modules(net, level)
        for name, value in vars(module).items()
        if type(value) is list and all(map(_has_gradient, value))
    ]
    return [(a, b) for a, b in pairs if type(b) is list and all(map(_has_gradient, b))]


def _pair_owners(net: nn.Module, level: nn.Module) -> Iterator[tuple[Owner, Owner]]:
    """Pair the attributes of both, and the dictionaries among them."""
    for module, part in pair_modules(net, level):
        yield vars(module), vars(part)
        for name, value in vars(part).items():
            owner = vars(module).get(name)
            if name not in INTERNAL and type(value) is dict and type(owner) is dict:
                yield owner, value


def _find_kept(owner: Owner, before: Owner) -> list[str]:
    """Find what has been given something with a gradient, but for weights that hooks compute."""
    names = [name for name, v in owner.items() if v is not before.get(name) and _has_gradient(v)]
    parameters = owner.get("_parameters", ())  # of which they do: `weight_v`, `weight_orig`
    return [name for name in names if not any(other.startswith(f"{name}_") for other in parameters)]


def _has_gradient(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(value))
