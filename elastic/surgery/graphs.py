"""Find out whether an autograd graph still hangs on a parameter, and let go of those that are done with."""

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from elastic.errors import StructureError


def refuse_live_graph(tensors: Iterable[Tensor]) -> None:
    """Raise StructureError where a graph is alive: it expects its parameters as they are.

    Its next backward would be wrong, in silence.
    """
    parameters = _select_parameters(tensors)
    if any(map(_has_live_graph, parameters)):
        gc.collect()  # it may hang on a reference cycle only
        if any(map(_has_live_graph, parameters)):
            raise StructureError(
                "an autograd graph of this model is alive: drop its outputs and losses first, or keep them "
                "detached"
            )


def release_graphs(tensors: Iterable[Tensor]) -> None:
    """Let parameters go from the graphs that hang on them, from which no gradient is asked any more.

    A metric's last value holds such a graph, or features that a network keeps. A parameter whose type has
    been another one forgets its gradient accumulator.
    """
    for parameter in _select_parameters(tensors):
        value = parameter.data
        other_type = torch.float64 if value.dtype != torch.float64 else torch.float32
        parameter.data = value.new_empty(0, dtype=other_type)
        parameter.data = value


def _select_parameters(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Select what gradients are computed of: tensors that inference mode has made are in no graph."""
    return [tensor for tensor in tensors if tensor.requires_grad and not tensor.is_inference()]


@torch.inference_mode(False)
def _has_live_graph(parameter: Tensor) -> bool:
    """Tell whether a parameter's gradient accumulator is older than this call.

    There is one a parameter, as long as a graph holds it, and it remembers the shape it was made for: so let
    the parameter be empty for a moment, ask for its accumulator, and see which shape that has.
    """
    value = parameter.data
    parameter.data = value.new_empty(0)
    with torch.enable_grad():
        view: Any = parameter.view_as(parameter)
    accumulator = view.grad_fn.next_functions[0][0]
    parameter.data = value
    return tuple(accumulator._input_metadata[0].shape) != (0,)
