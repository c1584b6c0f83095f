"""Measure how far a network's outputs are from another's, whatever they are."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from elastic.errors import OptionError

Outputs = Literal["classes", "values"]


def compare_classes(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of classes (dimension 1: of images, or of each pixel) against another's."""
    return F.cross_entropy(output, target.softmax(1))


def compare_values(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference."""
    return F.mse_loss(output, target)


Comparison = Callable[[Tensor, Tensor], Tensor]
COMPARISONS: dict[str, Comparison] = {"classes": compare_classes, "values": compare_values}


def check_outputs(outputs: Outputs) -> None:
    """Refuse a kind of outputs that there is not.

    Raises:
        OptionError: always then.
    """
    if outputs not in get_args(Outputs):
        raise OptionError(f"outputs cannot be '{outputs}': set outputs to {' or '.join(get_args(Outputs))}")


def compare_outputs(output: Any, target: Any, outputs: Outputs) -> Tensor:
    """Return the loss of all outputs against another network's, which is not trained by it.

    Args:
        output, target: tensors, or equal structures of tensors (several heads).
        outputs: what they are: scores of classes, or values (regression, features).
    """
    compare = COMPARISONS[outputs]
    pairs = zip(tree_leaves(output), tree_leaves(target), strict=True)
    return torch.stack([compare(a, b.detach()) for a, b in pairs if torch.is_floating_point(a)]).sum()
