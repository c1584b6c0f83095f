"""Let Python and torch take traced values for tensors and numbers, while a forward is traced."""

import builtins
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from elastic.widths.tracing.proxies import Asked

# Functions that make a tensor of given sizes, or tell of a type: torch.fx does not see them where these are
# traced.
FACTORIES = tuple("ones zeros full empty arange rand randn linspace eye tensor as_tensor finfo iinfo".split())
# Methods that take sizes or types, which torch.fx does not see where the forward makes the tensor itself.
SIZED = tuple(
    "expand broadcast_to repeat tile view reshape narrow select type "
    "new_zeros new_ones new_empty new_full".split()
)


@contextmanager
def pass_for_values() -> Iterator[None]:
    """Let a forward that asks `isinstance(x, Tensor)` find a tensor where a traced value stands for one.

    So it finds a number, or a shape. Such a value has no `__class__` that says so: torch's own code in C
    would take it for a tensor's memory.
    """
    ask = builtins.isinstance
    samples = (torch.empty(0, device="meta"), 1, 0.5, torch.Size(), torch.float32, torch.device("cpu"))

    def is_instance(value: Any, kinds: Any) -> bool:
        if not issubclass(type(value), Asked) or (ask(value, kinds) and kinds is not Iterable):
            return ask(value, kinds)
        return any(ask(sample, kinds) for sample in samples) and ask(value.tracer.find(value.node), kinds)

    try:
        builtins.isinstance = is_instance  # type: ignore[assignment]
        yield
    finally:
        builtins.isinstance = ask


@contextmanager
def trace_factories(tracer: fx.Tracer) -> Iterator[None]:
    """Let functions that make tensors, and methods of tensors made so, be traced with traced numbers."""
    before = {name: getattr(torch, name) for name in FACTORIES}
    try:
        for name, function in before.items():
            setattr(torch, name, _make_traceable(tracer, function, "call_function", function))
        for name in SIZED:
            setattr(Tensor, name, _make_traceable(tracer, getattr(Tensor, name), "call_method", name))
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)
        for name in SIZED:
            if name in vars(Tensor):  # its base has torch's own
                delattr(Tensor, name)


def _make_traceable(
    tracer: fx.Tracer, function: Callable[..., Any], kind: str, target: Any
) -> Callable[..., Any]:
    @wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, fx.Proxy) for value in tree_leaves((args, kwargs))):
            return tracer.create_proxy(kind, target, args, kwargs)
        return function(*args, **kwargs)

    return make
