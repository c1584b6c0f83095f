"""Find what a user has frozen, which is to stay as it is: `layer.requires_grad_(False)`."""

from torch import nn

from elastic.widths.discovery import Widths
from elastic.widths.operations.interface import is_stored
from elastic.widths.parameters import get_original


def find_frozen_widths(model: nn.Module, widths: Widths) -> set[str]:
    """Find the widths of which a parameter is not trained: neither to be grown nor to be pruned."""
    frozen = set()
    for name, width in widths.items():
        slots = [slot for slot in width.slots if is_stored(slot.tensor)]
        tensors = (get_original(model.get_submodule(slot.module), slot.tensor) for slot in slots)
        if any(isinstance(tensor, nn.Parameter) and not tensor.requires_grad for tensor in tensors):
            frozen.add(name)
    return frozen


def is_frozen(module: nn.Module) -> bool:
    """Tell whether a module has parameters of which none is trained."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
