"""Bring a network's outputs into the containers that files have, and compare them with those of a file."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.files.formats.interface import Outputs


class PlainOutputs(nn.Module):
    """Return the tensors of a network's outputs in tuples, lists and dictionaries."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

        @wraps(net.forward)  # whose signature names the inputs of the file
        def forward(*inputs: Tensor) -> Any:
            return make_plain_outputs(net(*inputs))

        self.forward = forward


def is_plain(outputs: Any) -> bool:
    """Tell whether outputs are tensors alone, in tuples, lists and dictionaries."""
    if type(outputs) in (tuple, list):
        return all(map(is_plain, outputs))
    if type(outputs) in (dict, OrderedDict):
        return all(map(is_plain, outputs.values()))
    return isinstance(outputs, Tensor)


def make_plain_outputs(outputs: Any) -> Any:
    """Make tuples, lists and dictionaries of nested outputs, without what is no tensor."""
    if isinstance(outputs, Mapping):
        parts = {name: make_plain_outputs(value) for name, value in outputs.items()}
        return {name: part for name, part in parts.items() if part is not None}
    if isinstance(outputs, tuple | list):
        return (list if isinstance(outputs, list) else tuple)(
            part for part in map(make_plain_outputs, outputs) if part is not None
        )
    if is_dataclass(outputs):
        return make_plain_outputs({field.name: getattr(outputs, field.name) for field in fields(outputs)})
    return outputs if isinstance(outputs, Tensor) else None


def measure_difference(actual: Outputs, expected: Outputs) -> float:
    """Measure the largest difference of outputs, relative to the largest value where that is above 1.

    Raises:
        StructureError: there are others, or of other shapes.
    """
    if not expected or len(actual) != len(expected):
        raise StructureError(f"{len(actual)} of {len(expected)} outputs can be written: return tensors alone")
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape:
            shapes = f"{tuple(a.shape)} in place of {tuple(b.shape)}"
            raise StructureError(f"an output would be {shapes}: return another, or name another format")
    return float(torch.stack([*map(_measure_distance, actual, expected)]).max())  # NaN if any is


def _measure_distance(actual: Tensor, expected: Tensor) -> Tensor:
    """Measure the largest difference of two tensors; what is infinite in both is the same."""
    a, b = actual.to(torch.complex128), expected.to(torch.complex128)
    differences, sizes = (a - b).abs()[a != b], b.abs()[b.isfinite()]
    zero, unit = sizes.new_zeros(1), sizes.new_ones(1)
    return torch.cat([zero, differences]).max() / torch.cat([unit, sizes]).max()
