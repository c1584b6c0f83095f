"""Trace what has its own way to a gradient: `torch.autograd.Function`, activation checkpoints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
import torch._dynamo  # torch does so where it first needs it: here, while its functions are stood in for
from torch._functorch import utils
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, FunctionMeta
from torch.utils import checkpoint

from elastic.widths.tracing.concrete import ConcreteTracer
from elastic.widths.tracing.patching import has_traced

# What keeps the inputs of a checkpoint, by the names of torch 2.11 and of 2.14.
KEEPERS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")


@contextmanager
def trace_functions(tracer: ConcreteTracer, keep_gradients: bool) -> Iterator[None]:
    """Let `Function.apply` be traced, and what activation checkpointing would compute again.

    Args:
        keep_gradients: make one node of the call, which has the function's own gradient, and not those of
            what its forward does, whose channels can be followed.
    """
    unwrap = utils.unwrap_dead_wrappers
    keepers = {name: getattr(checkpoint, name) for name in KEEPERS if hasattr(checkpoint, name)}
    # Not `apply`, which is in C, and programs keep it under a name, `swish = Swish.apply`: it asks the class
    # for these two, in this order, before it computes without gradients. What the class of a class has as a
    # property comes before what the class itself has.
    calls = _Calls(tracer, keep_gradients)
    try:
        utils.unwrap_dead_wrappers = lambda args: args if has_traced(args) else unwrap(args)
        setattr(FunctionMeta, "setup_context", property(calls.get_setup))  # noqa: B010
        setattr(FunctionMeta, "forward", property(calls.get_forward))  # noqa: B010
        for name in keepers:
            setattr(checkpoint, name, _keep_nothing)
        yield
    finally:
        for name, keep in keepers.items():
            setattr(checkpoint, name, keep)
        delattr(FunctionMeta, "forward")
        delattr(FunctionMeta, "setup_context")
        utils.unwrap_dead_wrappers = unwrap


class _Calls:
    """Stand between `apply` of functions, and what these compute."""

    def __init__(self, tracer: ConcreteTracer, keep_gradients: bool) -> None:
        self.tracer, self.keep_gradients = tracer, keep_gradients
        self.applied: type[Function] | None = None  # whose forward is asked for next
        self.has_gradient = True  # where that is applied; within, torch computes none

    def get_setup(self, kind: type[Function]) -> Callable[..., Any]:
        """Get what keeps tensors for the backward pass; nothing is kept of traced values."""
        set_up = _get_static(kind, "setup_context")
        if not issubclass(Function, kind):  # the bases are asked as well, for torch to compare with
            self.applied, self.has_gradient = kind, torch.is_grad_enabled()
        if set_up is _get_static(Function, "setup_context"):
            return set_up
        return lambda ctx, inputs, output: None if has_traced(inputs) else set_up(ctx, inputs, output)

    def get_forward(self, kind: type[Function]) -> Callable[..., Any]:
        """Get a function's forward, or what is traced in its place where it is applied."""
        forward = _get_static(kind, "forward")
        if self.applied is not kind:
            return forward

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.applied = None
            if not has_traced(args):
                return forward(*args, **kwargs)
            with torch.set_grad_enabled(self.has_gradient):
                return self._trace(kind, forward, args, kwargs)

        return run

    def _trace(self, kind: type[Function], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        has_context = isinstance(args[0], FunctionCtx)
        inputs = args[has_context:]
        if kind is checkpoint.CheckpointFunction:
            function, _, *values = inputs
            return function(*values)
        if self.keep_gradients:
            return self.tracer.create_proxy("call_function", make_call(kind), inputs, kwargs)
        context: Any = FunctionCtx()  # torch's own keeps tensors alone
        context.needs_input_grad = (True,) * len(inputs)
        self.tracer.has_own_gradient, before = True, self.tracer.has_own_gradient
        try:
            return forward(*((context, *inputs) if has_context else inputs), **kwargs)
        finally:
            self.tracer.has_own_gradient = before


def _get_static(kind: type[Function], name: str) -> Callable[..., Any]:
    """Get a static method of a class, whatever its class's class has."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    return vars(owner)[name].__get__(None, kind)  # type: ignore[no-any-return]


def _keep_nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stand for what keeps the inputs of a checkpoint: it runs around what that computes."""
    yield


@cache
def make_call(kind: type[Function]) -> Callable[..., Any]:
    """Make a function of a kind of functions, by a name that no operation has."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return kind.apply(*args, **kwargs)

    call.__name__, call.__module__ = f"{kind.__name__}.apply", kind.__module__
    return call
