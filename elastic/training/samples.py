"""Take a few training samples for a decision, on the device of the network."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from elastic.errors import TrainingError, cite
from elastic.training.capturing import capture_inputs
from elastic.training.joining import find_structure
from elastic.training.kinds import is_kind
from elastic.training.structure import Structure
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.leaves import list_tensors
from elastic.widths.mode import preserve_modes, set_mode


class Sampler(Protocol):
    """Give training samples as validation would see them, as `elastic.data.ImageData` does."""

    train_set: Any

    def sample(self, n: int, seed: int) -> tuple[Tensor, Tensor]: ...


def count_samples(batch: Any) -> int:
    """Count the samples of a batch: the length of its first tensor that has one."""
    return next((len(tensor) for tensor in list_tensors(batch) if tensor.dim()), 0)


def check_loss(trainer: L.Trainer, structure: Structure) -> None:
    """Try the loss that channels are judged by, on two training samples.

    Raises:
        TrainingError: it does not take what the network says and the batches hold.
    """
    x, y_B = sample_batch(trainer, 2, structure.seed)
    net = structure.net
    try:
        with torch.no_grad(), preserve_modes(net):
            structure.compute_loss(set_mode(net)(*list_inputs(x)), y_B)
    except Exception as error:  # it may be the user's own
        raise TrainingError(
            f"the loss that channels are judged by does not take the network's outputs: {cite(error)}. In a "
            "program of your own, give one that does with FollowNetwork('…', loss=…)"
        ) from error


def sample_batch(trainer: L.Trainer, count: int, seed: int) -> tuple[Example, Tensor]:
    """Return the inputs and the targets of about `count` training samples; see `take_samples`.

    Raises:
        TrainingError: they cannot be told in the batches.
    """
    x, y_B = take_samples(trainer, count, seed)
    if y_B is None:
        raise TrainingError(
            "the targets of samples cannot be told: batches are no pairs (inputs, targets), nor have they "
            "one tensor beside what the network is called with: give such, or choose a start of fresh "
            "channels, or an importance, that needs no gradients"
        )
    return x, y_B


def take_samples(trainer: L.Trainer, count: int, seed: int) -> tuple[Example, Tensor | None]:
    """Return the inputs (one, or several) and the targets y_B of about `count` training samples.

    A data module with a `sample` method is asked; from any other data the first batches are taken. Where
    those are no pairs of inputs and targets, inputs are what a training step calls the network with, and
    targets are the one tensor of a batch beside them, None where there are several.

    Raises:
        TrainingError: the inputs cannot be told in the batches.
    """
    device = trainer.strategy.root_device
    data = trainer.datamodule  # type: ignore[attr-defined]
    if hasattr(data, "sample"):
        sampler = cast(Sampler, data)
        x_BCHW, y_B = sampler.sample(min(count, len(sampler.train_set)), seed)
        return x_BCHW.to(device), y_B.to(device)
    with isolate_rng():
        loader = _iterate_batches(trainer.fit_loop._data_source.dataloader())
        batch = next(loader)
        size = max(1, count_samples(batch))
        batches = [batch, *islice(loader, max(0, count // size - 1))]
        batches = [
            trainer.strategy.batch_to_device(batch, device) for batch in batches
        ]  # by the module's hooks
    inputs, targets = zip(*(_split(trainer.lightning_module, batch) for batch in batches), strict=True)
    x: Example = trainer.precision_plugin.convert_input(_join(inputs, count))
    return x, None if any(y is None for y in targets) else torch.cat(targets)[:count]


def _iterate_batches(loaders: Any) -> Iterator[Any]:
    """Iterate over the batches of one loader, or of several at once as a fit does, from their start."""
    mode: Any = "max_size_cycle"
    if is_kind(loaders, CombinedLoader):
        loaders, mode = loaders.iterables, loaders._mode  # another has its place in the epoch
    return (batch for batch, *_ in CombinedLoader(loaders, mode))


def _split(module: L.LightningModule, batch: Any) -> tuple[Example, Tensor | None]:
    """Split a batch into the inputs of the network and the targets, None where those cannot be told."""
    structure = find_structure(module)
    if _is_pair(batch, structure):
        return batch[0], batch[1]
    inputs, reason = None, "a training step does not call the network with them"
    try:
        if structure is not None:
            inputs = capture_inputs(module, structure.net, lambda: module.training_step(batch, 0))
    except Exception as error:  # it is the user's own
        reason = cite(error)
    if inputs is None:
        raise TrainingError(
            f"samples cannot be taken from the batches ({reason}): give pairs (inputs, targets), or choose a "
            "start of fresh channels, or an importance, that needs no samples"
        )
    return inputs, _find_targets(_find_part(batch, list_inputs(inputs)), list_inputs(inputs))


def _is_pair(batch: Any, structure: Structure | None) -> bool:
    """Tell whether a batch has as many inputs as a network, where it is known, and then its targets."""
    if not isinstance(batch, list | tuple) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        return False
    inputs = batch[0] if isinstance(batch[0], list | tuple) else [batch[0]]
    count = len(inputs) if structure is None else len(list_inputs(structure.example))
    return len(inputs) == count and all(isinstance(x, Tensor) for x in inputs)


def _find_part(batch: Any, inputs: Sequence[Tensor]) -> Any:
    """Find the innermost part of a batch with all that a network is called with: that of one loader, say."""
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    for part in parts:
        addresses = {tensor.data_ptr() for tensor in list_tensors(part)}
        if not isinstance(part, Tensor) and addresses >= {x.data_ptr() for x in inputs}:
            return _find_part(part, inputs)
    return batch


def _find_targets(batch: Any, inputs: Sequence[Tensor]) -> Tensor | None:
    """Find the one tensor of a batch that a network is not called with, or what that was made of."""
    leaves = [tensor for tensor in list_tensors(batch) if tensor.dim()]
    sources = [leaf for leaf in leaves if any(leaf.data_ptr() == x.data_ptr() for x in inputs)]
    if not sources:  # normalized on the way, say
        sources = [leaf for leaf in leaves if any(leaf.shape == x.shape for x in inputs)]
    candidates = [leaf for leaf in leaves if all(leaf is not source for source in sources)]
    return candidates[0] if len(candidates) == 1 else None


def _join(batches: Sequence[Example], count: int) -> Example:
    """Join the first samples of batches."""
    parts = zip(*map(list_inputs, batches), strict=True)
    joined = tuple(torch.cat(part)[:count] for part in parts)
    return joined[0] if isinstance(batches[0], Tensor) else joined
