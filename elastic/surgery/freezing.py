"""Find what a user has frozen, which is to stay as it is.

By `layer.requires_grad_(False)`, or as the network's forward computes it without gradients.
"""

from torch import nn

from elastic.widths.operations.interface import is_stored
from elastic.widths.parameters import get_original
from elastic.widths.width import Widths


def find_frozen_widths(model: nn.Module, widths: Widths) -> dict[str, str]:
    """Find the widths of which a parameter is not trained: neither to be grown nor to be pruned.

    Returns:
        of each such width, the path of a parameter that is not trained.
    """
    frozen = dict[str, str]()
    for name, width in widths.items():
        for slot in (slot for slot in width.slots if is_stored(slot.tensor)):
            tensor = get_original(model.get_submodule(slot.module), slot.tensor)
            is_untrained = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
            if is_untrained or slot.module in widths.untrained:
                frozen.setdefault(name, f"{slot.module}.{slot.tensor}")
    return frozen


def is_frozen(model: nn.Module, widths: Widths, path: str) -> bool:
    """Tell whether a part of a model has parameters of which none is trained."""
    parameters = list(model.get_submodule(path).named_parameters(path))
    return bool(parameters) and not any(
        parameter.requires_grad and name.rpartition(".")[0] not in widths.untrained
        for name, parameter in parameters
    )
