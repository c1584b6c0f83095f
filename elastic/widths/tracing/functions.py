"""Trace what has its own way to a gradient: `torch.autograd.Function`, activation checkpoints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import fx
from torch._functorch import utils
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, _SingleLevelFunction
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from elastic.widths.tracing.concrete import ConcreteTracer


@contextmanager
def trace_functions(tracer: ConcreteTracer, keep_gradients: bool) -> Iterator[None]:
    """Let `Function.apply` be traced, and what activation checkpointing would compute again.

    Args:
        keep_gradients: make one node of the call, which has the function's own gradient, and not those of
            what its forward does, whose channels can be followed.
    """
    unwrap, keep_inputs = utils.unwrap_dead_wrappers, checkpoint._checkpoint_without_reentrant_generator

    def apply(kind: type[Function], *args: Any, **kwargs: Any) -> Any:
        if not _are_traced(args):
            return super(_SingleLevelFunction, kind).apply(*args, **kwargs)  # type: ignore[misc]
        if kind is checkpoint.CheckpointFunction:
            function, _, *inputs = args
            return function(*inputs)
        if keep_gradients:
            return tracer.create_proxy("call_function", make_call(kind), args, kwargs)
        context: Any = FunctionCtx()
        context.needs_input_grad = (True,) * len(args)
        is_alone = kind.setup_context is not Function.setup_context
        tracer.has_own_gradient, before = True, tracer.has_own_gradient
        try:
            return kind.forward(*(args if is_alone else (context, *args)), **kwargs)
        finally:
            tracer.has_own_gradient = before

    try:
        # Not `Function.apply`, which calls both: programs keep it under a name, `swish = Swish.apply`.
        utils.unwrap_dead_wrappers = lambda args: args if _are_traced(args) else unwrap(args)
        setattr(_SingleLevelFunction, "apply", classmethod(apply))  # noqa: B010
        checkpoint._checkpoint_without_reentrant_generator = _keep_nothing
        yield
    finally:
        checkpoint._checkpoint_without_reentrant_generator = keep_inputs
        utils.unwrap_dead_wrappers = unwrap
        delattr(_SingleLevelFunction, "apply")


def _keep_nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stand for what keeps the inputs of a checkpoint: it runs around what that computes."""
    yield


def _are_traced(args: tuple[Any, ...]) -> bool:
    return any(isinstance(value, fx.Proxy) for value in tree_leaves(args))


@cache
def make_call(kind: type[Function]) -> Callable[..., Any]:
    """Make a function of a kind of functions, by a name that no operation has."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return kind.apply(*args, **kwargs)

    call.__name__, call.__module__ = f"{kind.__name__}.apply", kind.__module__
    return call
