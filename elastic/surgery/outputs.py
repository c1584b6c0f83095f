"""List what a network says, whatever holds it: what a change must leave as it is."""

from typing import Any

from torch import Tensor

from elastic.errors import StructureError
from elastic.widths.leaves import list_tensors


def list_output_tensors(outputs: Any) -> list[Tensor]:
    """List the tensors of a network's outputs, out of containers and objects of any class.

    Raises:
        StructureError: there are none, so that nothing can be compared.
    """
    tensors = list_tensors(outputs)
    if not tensors:
        raise StructureError(f"its output, a {type(outputs).__name__}, holds no tensors to compare")
    return tensors
