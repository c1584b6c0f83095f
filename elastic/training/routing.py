"""Let a network's calls run what a run trains: a level, its kernel activation modules, further loss terms.

A user's `training_step` stays as it is. `nn.Module.__call__` looks for a compiled call first: that is where a
`Router` stands. Copies of the network do not have it (torch leaves it out of what it copies), tracing does
not see it.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from elastic.widths.leaves import list_tensors, list_versions, replace_tensors

LossTerm = Callable[..., Tensor | None]


class Runner(Protocol):
    """Execute a network as it is to be trained now."""

    def run_active(self, *args: Any, **kwargs: Any) -> Any: ...

    def compute_loss_scale(self) -> float | None: ...


class _AddLoss(torch.autograd.Function):
    """Return a value as it is; backward, the loss gets the gradient that the run's own loss has."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.like = loss
        return value.clone()  # of a view, autograd does not let a program change the entries

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None


def add_loss(output: Any, loss: Tensor, scale: float) -> Any:
    """Return a network's output such that the gradient of `loss` comes with the output's own.

    It comes with each backward pass through this output, whole: a program that takes several through one call
    of its network counts it as often.

    Args:
        output: a tensor, or a container of tensors; the first that needs a gradient carries the loss.
        scale: what the run multiplies its own loss with (a gradient scaler, 1 / accumulated batches).
    """
    first = next((tensor for tensor in list_tensors(output) if tensor.requires_grad), None)
    if first is None:
        return output
    carrier = _AddLoss.apply(first, loss, scale)
    return replace_tensors(output, lambda tensor: carrier if tensor is first else tensor)


class Router:
    """Stand in for a network's call, and give the place back.

    Args:
        called: the network, or what stands for it in its module.
        runner: executes the network as it is to be trained now.
        terms: what each call in training adds to the loss, from the output and the inputs.

    Attributes:
        inner_call: the call that it stands in for, a compiled one perhaps.
        is_trained: there has been a call in training.
        changes_inputs: the network may write to its inputs, of which the terms are then given clones; the
            first call in training tells.
    """

    def __init__(self, called: nn.Module, runner: Runner, terms: Iterable[LossTerm]) -> None:
        self.called, self.runner, self.terms = called, runner, list(terms)
        self.inner_call: Callable[..., Any] = called._compiled_call_impl or called._call_impl
        self.is_trained = False
        self.changes_inputs = bool(self.terms)

    def install(self) -> None:
        """Take the call's place."""
        self.called._compiled_call_impl = self

    def remove(self) -> None:
        """Put the call back, unless something else has taken its place since."""
        if self.called._compiled_call_impl is self:
            is_plain = self.inner_call == self.called._call_impl
            self.called._compiled_call_impl = None if is_plain else self.inner_call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scale = self.runner.compute_loss_scale() if torch.is_grad_enabled() else None
        if scale is None:
            return self.runner.run_active(*args, **kwargs)
        self.is_trained = True
        inputs = (args, kwargs)
        originals = replace_tensors(inputs, Tensor.clone) if self.changes_inputs else inputs
        versions = list_versions(inputs)
        output = self.runner.run_active(*args, **kwargs)
        self.changes_inputs = self.changes_inputs and versions != list_versions(inputs)
        args, kwargs = originals
        losses = [loss for term in self.terms if (loss := term(output, *args, **kwargs)) is not None]
        return add_loss(output, torch.stack(losses).sum(), scale) if losses else output
