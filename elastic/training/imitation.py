"""Measure how far a network's outputs are from another's, whatever they are."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.errors import OptionError
from elastic.widths.hooks import quiet_hooks
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.leaves import iterate_leaves, list_tensors
from elastic.widths.mode import preserve_modes, set_mode
from elastic.widths.tracing import make_meta_copy, run_without_data

OutputKind = Literal["classes", "labels", "values"]


def compare_classes(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the cross entropy of classes (dimension 1: of images, or of each pixel) against another's."""
    return F.cross_entropy(output / temperature, (target / temperature).softmax(1))


def compare_labels(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the binary cross entropy of labels, each there or not, against another's."""
    return F.binary_cross_entropy_with_logits(output / temperature, (target / temperature).sigmoid())


def compare_values(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the mean squared difference, which no temperature changes."""
    return F.mse_loss(output, target) / temperature**2


Comparison = Callable[[Tensor, Tensor, float], Tensor]
COMPARISONS: dict[str, Comparison] = {
    "classes": compare_classes,
    "labels": compare_labels,
    "values": compare_values,
}


def check_outputs(outputs: OutputKind | None) -> None:
    """Refuse a kind of outputs that there is not; None stands for what a task says.

    Raises:
        OptionError: always then.
    """
    if outputs is not None and outputs not in get_args(OutputKind):
        raise OptionError(f"outputs cannot be '{outputs}': set outputs to {', '.join(get_args(OutputKind))}")


def compare_outputs(output: Any, target: Any, outputs: OutputKind, temperature: float = 1.0) -> Tensor:
    """Return the loss of all outputs against another network's, which is not trained by it.

    Args:
        output, target: tensors, or structures of tensors (several heads); what the output has behind those of
            the target, as heads that are there in training alone, is not compared.
        outputs: what they are: scores of classes, of labels, or values (regression, features); of classes,
            one that has a single score is compared as a value, since of one class all are sure.
        temperature: T that scores are divided by; times T², the gradient does not depend on its size.
    """
    losses = []
    for score, other in zip(iterate_leaves(output), iterate_leaves(target), strict=False):
        if _is_score(score):
            is_single = score.dim() < 2 or score.shape[1] < 2
            compare = COMPARISONS["values" if outputs == "classes" and is_single else outputs]
            losses.append(compare(_widen(score), _widen(other.detach()), temperature))
    return temperature**2 * torch.stack(losses).sum()


def _is_score(output: Any) -> bool:
    """Tell whether an output is one to compare: not a None, a number or an index."""
    return isinstance(output, Tensor) and output.is_floating_point()


def _widen(output: Tensor) -> Tensor:
    """Return an output in 32 bits or more."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


@torch.no_grad()
def find_output_shapes(net: nn.Module, example: Example) -> list[tuple[int, ...]]:
    """Find the shapes of a network's outputs in evaluation mode, for the samples of an example."""
    with preserve_modes(net), quiet_hooks(net):
        inputs = list_inputs(example)
        device = next(net.parameters(), inputs[0]).device
        outputs = set_mode(net).forward(*(x.to(device) for x in inputs))
    return [tuple(tensor.shape) for tensor in list_tensors(outputs)]


@torch.no_grad()
def find_training_shapes(net: nn.Module, example: Example) -> list[tuple[int, ...]] | None:
    """Find them in training mode, without the batch; None where they depend on data."""
    inputs = [x.new_empty((2, *x.shape[1:]), device="meta") for x in list_inputs(example)]
    try:
        with run_without_data(), quiet_hooks(net):
            outputs = set_mode(make_meta_copy(net), True).forward(*inputs)
    except Exception:  # the model's own forward runs here: anything may come
        return None
    return [tuple(tensor.shape[1:]) for tensor in list_tensors(outputs)]
