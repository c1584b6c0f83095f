"""Let a level's layers have views of the network's tensors, through which gradients reach these."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elastic.widths.leaves import list_tensors

Views = Sequence[tuple[str, str, Tensor]]  # of a layer's tensors, each by its path and its name


@contextmanager
def hold_views(level: nn.Module, views: Views) -> Iterator[None]:
    """Let a level's layers have views in the places of their tensors meanwhile, but for views they have."""
    tables = [(table, name, view) for path, name, view in views for table in _find_tables(level, path, name)]
    tables = [entry for entry in tables if not entry[0][entry[1]].requires_grad]
    before = [table[name] for table, name, _ in tables]
    for table, name, view in tables:
        table[name] = view
    try:
        yield
    finally:
        for (table, name, _), tensor in zip(tables, before, strict=True):
            table[name] = tensor


def _find_tables(level: nn.Module, path: str, name: str) -> list[dict[str, Any]]:
    """Find where a tensor is held: of what a trace has left out, nowhere."""
    try:
        layer = level.get_submodule(path)
    except AttributeError:
        return []
    return [table for table in (layer._parameters, layer._buffers) if name in table]


def hold_in_backward(output: Any, hold: Callable[[], AbstractContextManager[None]]) -> None:
    """Hold something, too, while gradients are computed from an output on: checkpointed parts run again then.

    Args:
        output: a tensor, or a container of tensors.
    """
    for tensor in list_tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(partial(_begin, hold))


def _begin(hold: Callable[[], AbstractContextManager[None]], grad: Tensor) -> None:
    stack = ExitStack()
    stack.enter_context(hold())
    torch.autograd.Variable._execution_engine.queue_callback(stack.close)  # type: ignore[attr-defined]
