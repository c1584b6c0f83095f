"""Catch what a program calls its network with."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.training.locating import find_called
from elastic.widths.inputs import Example
from elastic.widths.mode import preserve_modes

LOGS = ("log", "log_dict")  # a module's methods

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments, by position and by name


class _Reached(BaseException):
    """End a program's own code, whatever it catches, where it calls the network."""

    def __init__(self, call: Call) -> None:
        self.call = call


def capture_inputs(module: L.LightningModule, net: nn.Module, run: Callable[[], Any]) -> Example | None:
    """Return the tensors that a module calls its network with, None where it does not call it.

    Args:
        run: of the module, say its training step; it is left as it calls the network.

    Raises:
        StructureError: it is called with something else.
    """

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Reached((args, kwargs))

    called = find_called(module, net)
    call = called._compiled_call_impl  # a router's, or a compiled one
    called._compiled_call_impl = stop
    try:
        with (
            torch.no_grad(),
            preserve_modes(module),
            isolate_rng(),
            _log_nothing(module),
            torch.compiler.set_stance("force_eager"),  # what is compiled would not ask for the call
        ):
            module.eval()
            run()
    except _Reached as reached:
        return list_positional(net, reached.call)
    finally:
        called._compiled_call_impl = call
    return None


@contextmanager
def _log_nothing(module: L.LightningModule) -> Iterator[None]:
    """Let a step log before it calls its network, which Lightning allows in its own loops alone."""
    own = {name: vars(module)[name] for name in LOGS if name in vars(module)}
    vars(module).update(dict.fromkeys(LOGS, _ignore))
    try:
        yield
    finally:
        for name in LOGS:
            vars(module).pop(name)
        vars(module).update(own)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take what is logged, and keep nothing."""


def list_positional(net: nn.Module, call: Call) -> Example | None:
    """List what a call gives by position, by name too, up to what is no tensor; one tensor as it is.

    Raises:
        StructureError: there is something else in the first place.
    """
    args, kwargs = call
    try:
        values = inspect.signature(net.forward).bind(*args, **kwargs).args
    except (TypeError, ValueError):  # which the call itself would raise
        return None
    if values and not isinstance(values[0], Tensor):
        raise StructureError(
            f"{type(net).__name__} is called with a {type(values[0]).__name__}: let its forward take "
            "tensors, one by one"
        )
    inputs = tuple(x.detach() for x in takewhile(lambda value: isinstance(value, Tensor), values))
    return inputs[0] if len(inputs) == 1 else inputs or None
