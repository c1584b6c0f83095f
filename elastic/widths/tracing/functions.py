"""Trace functions with a gradient of their own (`torch.autograd.Function`), which torch.fx does not see."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import fx
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_leaves


@contextmanager
def trace_functions(tracer: fx.Tracer, keep_gradients: bool) -> Iterator[None]:
    """Let `Function.apply` be traced.

    Args:
        keep_gradients: make one node of the call, which has the function's own gradient, and not those of
            what its forward does, whose channels can be followed.
    """
    apply_untraced = vars(Function)["apply"]

    def apply(kind: type[Function], *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(value, fx.Proxy) for value in tree_leaves((args, kwargs))):
            return apply_untraced.__get__(None, kind)(*args, **kwargs)
        if keep_gradients:
            return tracer.create_proxy("call_function", make_call(kind), args, kwargs)
        if kind.setup_context is not Function.setup_context:
            return kind.forward(*args, **kwargs)
        context: Any = FunctionCtx()
        context.needs_input_grad = (True,) * len(args)
        return kind.forward(context, *args, **kwargs)

    try:
        Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
        yield
    finally:
        Function.apply = apply_untraced  # type: ignore[method-assign]


@cache
def make_call(kind: type[Function]) -> Callable[..., Any]:
    """Make a function of a kind of functions, by a name that no operation has."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return kind.apply(*args, **kwargs)

    call.__name__, call.__module__ = f"{kind.__name__}.apply", kind.__module__
    return call
