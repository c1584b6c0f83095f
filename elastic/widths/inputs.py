"""Handle what a network is called with: an example is one tensor, or several, by position.

An input of a batch has as many entries along its first dimension as the first input has; any other, such as a
number for all samples, is given whole.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic.errors import OptionError

Example = Tensor | Sequence[Tensor]
BYTES = 256  # values of a pixel in 8 bits
FEW = 2  # integers that any use as an index or a class allows


def list_inputs(example: Example) -> tuple[Tensor, ...]:
    """List the inputs of an example.

    Raises:
        OptionError: one is no tensor.
    """
    inputs = tuple(example) if isinstance(example, tuple | list) else (example,)
    for x in inputs:
        if not isinstance(x, Tensor):
            raise OptionError(
                f"an example input is a {type(x).__name__}: give the network's inputs as tensors, one by one"
            )
    return inputs


def count_batch(example: Example) -> int:
    """Count the samples of an example; 1 where no input has any dimension."""
    return next((len(x) for x in list_inputs(example) if x.dim()), 1)


def mark_batched(example: Example) -> list[tuple[Tensor, bool]]:
    """Mark the inputs of an example that have an entry for each sample."""
    batch = count_batch(example)
    return [(x, x.dim() > 0 and len(x) == batch) for x in list_inputs(example)]


def select_samples(example: Example, index: slice | Tensor) -> tuple[Tensor, ...]:
    """Select samples of an example's inputs."""
    return tuple(x[index] if has_batch else x for x, has_batch in mark_batched(example))


def split_batch(example: Example, samples: int) -> list[tuple[Tensor, ...]]:
    """Split the inputs of an example into parts of so many samples, the last of what is left."""
    starts = range(0, count_batch(example), samples)
    return [select_samples(example, slice(start, start + samples)) for start in starts]


def draw_inputs(
    model: nn.Module, example: Example, generator: torch.Generator, samples: int | None = None
) -> list[Tensor]:
    """Draw inputs like those of an example, on the CPU: floats from a normal, integers that differ.

    Integers may be indices: none is larger than what all embeddings of the model, or the example, have.

    Args:
        samples: how many, by default as many as the example has.
    """
    inputs, batch = list_inputs(example), count_batch(example)
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
    rows = min((embedding.num_embeddings for embedding in embeddings), default=FEW)
    tensors = []
    for x in inputs:
        has_batch = samples is not None and x.dim() > 0 and len(x) == batch
        shape = (samples, *x.shape[1:]) if has_batch else x.shape
        if x.is_floating_point() or x.is_complex():
            tensors.append(torch.randn(shape, generator=generator).to(x.dtype))  # type: ignore[arg-type]
        else:
            tensors.append(_spread(torch.Size(shape), _count_values(x, rows), generator).to(x.dtype))  # type: ignore[arg-type]
    return tensors


def _count_values(x: Tensor, rows: int) -> int:
    """Count the values that an input of integers may have, from 0 on."""
    if x.dtype in (torch.bool, torch.uint8):
        return 2 if x.dtype == torch.bool else BYTES
    largest = int(x.max()) if not x.is_meta and x.numel() else 0
    return max(rows, largest + 1)


def _spread(shape: torch.Size, values: int, generator: torch.Generator) -> Tensor:
    """Spread the entries of a tensor over values 0, 1, …: few samples of noise might be all alike."""
    entries = torch.arange(shape.numel()) * values // max(1, shape.numel())
    return entries[torch.randperm(len(entries), generator=generator)].view(shape)


def describe_inputs(example: Example) -> list[Any]:
    """Describe inputs in plain containers: the shape of one of floats, else type and sizes of each."""
    if isinstance(example, Tensor) and example.is_floating_point():
        return list(example.shape)
    return [[str(x.dtype).removeprefix("torch."), *x.shape] for x in list_inputs(example)]


def make_zeros(description: Sequence[Any], *batch: int) -> Example:
    """Make inputs of zeros as `describe_inputs` has described them, with further dimensions in front.

    Raises:
        TypeError, ValueError, AttributeError, RuntimeError: there are no such inputs.
    """
    if all(isinstance(size, int) for size in description):
        return torch.zeros(*batch, *description)
    return tuple(torch.zeros(*batch, *sizes, dtype=getattr(torch, name)) for name, *sizes in description)
