"""Take a few training samples for a decision, on the device of the network."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves

from elastic.errors import TrainingError, cite
from elastic.training.structure import Structure
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.tracing import preserve_modes


class Sampler(Protocol):
    """Give training samples as validation would see them, as `elastic.data.ImageData` does."""

    train_set: Any

    def sample(self, n: int, seed: int) -> tuple[Tensor, Tensor]: ...


def count_samples(batch: Any) -> int:
    """Count the samples of a batch: the length of its first tensor that has one."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def check_loss(trainer: L.Trainer, structure: Structure) -> None:
    """Try the loss that channels are judged by, on two training samples.

    Raises:
        TrainingError: it does not take what the network says and the batches hold.
    """
    x, y_B = sample_batch(trainer, 2, structure.seed)
    net = structure.net
    try:
        with torch.no_grad(), preserve_modes(net):
            structure.compute_loss(net.eval()(*list_inputs(x)), y_B)
    except Exception as error:  # it may be the user's own
        raise TrainingError(
            f"the loss that channels are judged by does not take the network's outputs: {cite(error)}. In a "
            "program of your own, give one that does with FollowNetwork('…', loss=…)"
        ) from error


def sample_batch(trainer: L.Trainer, count: int, seed: int) -> tuple[Example, Tensor]:
    """Return the inputs (one, or several where a batch has such) and y_B of about `count` training samples.

    A data module with a `sample` method is asked; from any other data the first batches are taken.

    Raises:
        TrainingError: batches are no pairs of inputs and targets.
    """
    device = trainer.strategy.root_device
    data = trainer.datamodule  # type: ignore[attr-defined]
    if hasattr(data, "sample"):
        sampler = cast(Sampler, data)
        x_BCHW, y_B = sampler.sample(min(count, len(sampler.train_set)), seed)
        return x_BCHW.to(device), y_B.to(device)
    with isolate_rng():
        loader = trainer.fit_loop._data_source.dataloader()
        batches = iter(loader)
        batch = next(batches)
        is_pair = isinstance(batch, list | tuple) and len(batch) == 2 and _is_example(batch[0])
        size = count_samples(batch[0]) if is_pair else 0
        if not size:
            raise TrainingError(
                "samples are taken from pairs (inputs, targets), which the batches are not: give those, "
                "or choose a start of fresh channels, or an importance, that needs no gradients"
            )
        taken = [batch, *islice(batches, max(0, count // size - 1))]
        taken = [trainer.strategy.batch_to_device(each, device) for each in taken]  # with the module's hooks
    inputs, targets = zip(*taken, strict=True)
    x, y_B = _join(inputs, count), torch.cat(targets)[:count]
    converted: Example = trainer.precision_plugin.convert_input(x)
    return converted, y_B


def _is_example(inputs: Any) -> bool:
    parts = inputs if isinstance(inputs, list | tuple) else [inputs]
    return all(isinstance(x, Tensor) for x in parts)


def _join(batches: Sequence[Example], count: int) -> Example:
    """Join the first samples of batches."""
    parts = zip(*map(list_inputs, batches), strict=True)
    joined = tuple(torch.cat(part)[:count] for part in parts)
    return joined[0] if isinstance(batches[0], Tensor) else joined
