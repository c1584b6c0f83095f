"""Compile networks that change, and many of one class."""

import types
from typing import Any

import torch
from torch import nn


def compile_network(net: nn.Module, **options: Any) -> None:
    """Compile a network as one graph and with a cache of its own; names in state dicts stay.

    torch skips the forward of its own containers, so that `nn.Sequential.compile` compiles what is in it
    piece by piece; and it keeps compiled code by code object, eight of them, then runs eagerly with no more
    than a warning: all networks of one class share those eight, and four nested levels are enough to exceed
    them. Call `torch.compiler.reset()` when the network has changed.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return net._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    code = call.__code__.replace()  # equal, but another object
    separate = types.FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)
    net._compiled_call_impl = torch.compile(separate, **options)
