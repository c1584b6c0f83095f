"""Copy modules, also those whose weights a hook computes (old `weight_norm`, `torch.nn.utils.prune`)."""

import copy
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from elastic.errors import StructureError, cite
from elastic.widths.functions import copy_function, holds_part
from elastic.widths.parameters import get_kind

Module = TypeVar("Module", bound=nn.Module)
ATOMS = {int, float, bool, str, type(None)}  # that copies share
RUN = "holds_run"  # an attribute of the class of modules that do
COMPILED = "_compiled_call_impl"  # what `compile()` has made of a module's forward, which no copy takes along


def copy_module(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """Copy a module as `copy.deepcopy` does, which refuses tensors that autograd has computed.

    It takes less time, where the modules leave their copying to Python. What holds the run of a whole program
    is left out.

    Raises:
        StructureError: it holds what cannot be copied.
    """
    try:
        with _without_runs(module):
            return _copy_module(module, {} if memo is None else memo)
    except Exception as error:  # what modules hold is copied by code of its own: anything may come
        raise StructureError(
            f"{type(module).__name__} cannot be copied ({cite(error)}): let its modules hold no more than "
            "copy.deepcopy copies"
        ) from error


def find_runs(module: nn.Module) -> list[str]:
    """Find the children that hold what has happened to a network in a run, not a part of it: their paths."""
    return [path for path, part in module.named_modules() if hasattr(type(part), RUN)]


@contextmanager
def _without_runs(module: nn.Module) -> Iterator[None]:
    """Take such children out of their modules meanwhile."""
    children = [module.get_submodule(path.rpartition(".")[0])._modules for path in find_runs(module)]
    before = [dict(own) for own in children]
    for own in children:
        for name in [name for name, child in own.items() if hasattr(type(child), RUN)]:
            del own[name]
    try:
        yield
    finally:
        for own, content in zip(children, before, strict=True):
            own.clear()
            own.update(content)


def _copy_module(module: Module, memo: dict[int, Any]) -> Module:
    parts = list(module.modules())
    _share_owners(parts, memo)
    if not all(map(_is_copied_by_default, parts)):
        _refuse_functions(parts)
        for leaf in (leaf for part in parts for leaf in tree_leaves(vars(part))):
            _note_computed(leaf, memo)
        return copy.deepcopy(module, memo)
    for part in parts:
        memo[id(part)] = object.__new__(type(part))
    for part in parts:
        attributes = {name: value for name, value in vars(part).items() if name != COMPILED}
        for name, value in attributes.items():
            if type(value) not in ATOMS:
                attributes[name] = _copy_value(value, memo)
        vars(memo[id(part)]).update(attributes)
    replica: Module = memo[id(module)]
    return replica


def _refuse_functions(parts: Sequence[nn.Module]) -> None:
    """Refuse functions that hold a part: Python's own copies would run it as it is in the model."""
    own = set(map(id, parts))
    for part in parts:
        for name, value in vars(part).items():
            if name != COMPILED and isinstance(value, FunctionType) and holds_part(value, own):
                raise TypeError(f"'{name}' of a {type(part).__name__} is a function that holds a module")


def _share_owners(parts: Sequence[nn.Module], memo: dict[int, Any]) -> None:
    """Let the copy's hooks hold what the module's do, where that is around it: a program, a profiler."""
    own = set(map(id, parts))
    tables = (value for part in parts for name, value in vars(part).items() if name.endswith("_hooks"))
    for hooks in (value for value in tables if isinstance(value, dict)):
        for owner in (owner for hook in hooks.values() for owner in _list_owners(hook)):
            if id(owner) not in own and _is_around(owner, own):
                memo[id(owner)] = owner


def _list_owners(hook: Any) -> Iterator[Any]:
    """List the objects that a hook is a method of, or has been given."""
    if isinstance(hook, partial):
        yield from _list_owners(hook.func)
        yield from (*hook.args, *hook.keywords.values())
    else:
        yield getattr(hook, "__self__", hook)


def _is_around(owner: Any, own: Container[int]) -> bool:
    """Tell whether an object is a module that is none of some modules, or holds one."""
    values = (owner, *getattr(owner, "__dict__", {}).values())
    return any(isinstance(value, nn.Module) and id(value) not in own for value in values)


def _is_copied_by_default(module: nn.Module) -> bool:
    kind = get_kind(module)  # which is copied as any other, whatever is parametrized
    if hasattr(kind, "__deepcopy__") or issubclass(kind, nn.RNNBase):
        return False
    is_default = (kind.__reduce_ex__, kind.__getstate__) == (object.__reduce_ex__, nn.Module.__getstate__)
    # torch.nn mends old files there, and torch.compile puts a function of its own in the place of all
    return is_default and kind.__setstate__.__module__.startswith("torch.")


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in (OrderedDict, set) and not value:  # of hooks, of the names of buffers
        return kind()
    if kind is dict or kind is list or _lacks_names(value):
        return _copy_container(value, memo)
    if kind is FunctionType:
        return copy_function(value, memo)
    if kind in ATOMS or (kind is tuple and all(type(part) in ATOMS for part in value)):
        return value
    _note_computed(value, memo)
    return copy.deepcopy(value, memo)


def _lacks_names(value: Any) -> bool:
    """Tell whether a dictionary raises KeyError for attributes that it lacks, which `copy.deepcopy` asks for.

    Settings by name often are of a class with `__getattr__ = dict.__getitem__`.
    """
    try:
        getattr(value, "__deepcopy__", None)
    except KeyError:
        return isinstance(value, dict)
    return False


def _note_computed(value: Any, memo: dict[int, Any]) -> None:
    """Note the copy of a tensor that autograd has computed, which a deep copy refuses."""
    if isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo:
        memo[id(value)] = value.detach().clone()


def _copy_container(value: Any, memo: dict[int, Any]) -> Any:
    """Copy a dictionary or a list; one that several modules hold stays one."""
    if id(value) in memo:
        return memo[id(value)]
    replica = memo[id(value)] = type(value)()
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        part = memo[id(part)] if id(part) in memo else _copy_value(part, memo)
        if isinstance(value, dict):
            replica[key] = part
        else:
            replica.append(part)
    return replica
