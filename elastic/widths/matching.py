"""Hold widths against the model that they are given with."""

from torch import nn

from elastic.errors import OptionError, StructureError
from elastic.widths.operations.interface import is_stored
from elastic.widths.parameters import get_original
from elastic.widths.width import Slot, Widths

REMEDY = "give those that discover(net, example) finds now"


def require_widths(model: nn.Module, widths: object) -> None:
    """Refuse widths that are not a model's as it is now.

    Raises:
        OptionError: they are something else, such as an example input.
        StructureError: they are another model's, or of before this one changed.
    """
    if not isinstance(widths, Widths):
        raise OptionError(f"a {type(widths).__name__} is no widths: {REMEDY}")
    for slot in dict.fromkeys(slot for width in widths.values() for slot in width.slots):
        if is_stored(slot.tensor):
            fault = _find_fault(model, slot, sum(widths.extents(slot)))
            if fault is not None:
                raise StructureError(
                    f"these are not the widths of the {type(model).__name__}: {fault}; {REMEDY}"
                )


def _find_fault(model: nn.Module, slot: Slot, extent: int) -> str | None:
    """Say where a tensor has not the channels that widths tell of; None where it has."""
    try:
        tensor = get_original(model.get_submodule(slot.module), slot.tensor)
    except AttributeError:
        tensor = None
    name = f"{slot.module}.{slot.tensor}".lstrip(".")
    if tensor is None or tensor.dim() <= slot.dim:
        return f"it has no {name} with channels on dimension {slot.dim}"
    size = tensor.shape[slot.dim]
    return None if size == extent else f"{name} has {size} on dimension {slot.dim}, they have {extent}"
