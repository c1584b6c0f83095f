"""List what a network says, whatever holds it: what a change must leave as it is."""

from dataclasses import is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from elastic.errors import StructureError


def list_output_tensors(outputs: Any) -> list[Tensor]:
    """List the tensors of a network's outputs, out of tuples, dictionaries or a dataclass.

    Raises:
        StructureError: there are none, so that nothing can be compared.
    """
    contents = vars(outputs) if is_dataclass(outputs) else outputs
    tensors = [y for y in tree_leaves(contents) if isinstance(y, Tensor)]
    if not tensors:
        raise StructureError(f"its output, a {type(outputs).__name__}, holds no tensors to compare")
    return tensors
