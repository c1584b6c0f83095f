"""Ask a teacher about all training images before training, instead of in each of its steps.

Shapes: N training images, B samples of a batch, K classes or labels.
"""

from collections.abc import Iterator
from typing import Any, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from elastic.errors import TrainingError
from elastic.training.structure import Structure


class Images(Protocol):
    """Give all training images in their order, augmented as in an epoch, as `elastic.data.ImageData` does."""

    def iterate_train(self, epoch: int, device: torch.device) -> Iterator[Tensor]: ...


class Answers:
    """Hold a teacher's mean answers about training images, and find those of the batch that is trained on.

    Args:
        answers_NK: in the order of the data set.
    """

    def __init__(self, answers_NK: Tensor) -> None:
        self.answers_NK = answers_NK
        self.batches: tuple[Tensor, ...] = ()
        self.batch = -1

    def begin_epoch(self, loader: Any) -> None:
        """Read in which order an epoch takes the images; once, so that a step copies nothing."""
        order = torch.tensor(list(loader.sampler), device=self.answers_NK.device)
        self.batches = order.split(loader.batch_size)
        self.batch = -1

    def begin_batch(self, loader: Any) -> None:
        """Go on to the loader's next batch."""
        if not self.batches:  # restarted in the middle of an epoch: the loader begins anew, nothing told so
            self.begin_epoch(loader)
        self.batch += 1

    def find(self, count: int) -> Tensor:
        """Return the answers about the present batch.

        Raises:
            TrainingError: the network is not called with the whole batch.
        """
        index_B = self.batches[self.batch]
        if len(index_B) != count:
            raise TrainingError(
                f"the network is called with {count} of the {len(index_B)} images of a batch, so that the "
                "teacher's answers cannot be told: set callbacks.distil.views=0"
            )
        return self.answers_NK[index_B]


def ask_teacher(trainer: L.Trainer, structure: Structure, teacher: nn.Module, views: int) -> Answers:
    """Ask a teacher about so many augmented views of each training image.

    A view is augmented as in the epoch of its number, from a seed of its own: a run that goes on asks alike.

    Raises:
        TrainingError: data whose images and their order are not known, or answers that are no vectors.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    loader: Any = trainer.train_dataloader
    if not hasattr(data, "iterate_train") or not isinstance(
        getattr(loader, "sampler", None), DistributedSampler
    ):
        raise TrainingError(
            "a teacher is asked beforehand about elastic.data.ImageData alone: use it, or set "
            "callbacks.distil.views=0"
        )
    device, sums = trainer.strategy.root_device, []
    with isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
        for view in range(views):
            torch.manual_seed(structure.make_seed(view, 0))
            images = cast(Images, data).iterate_train(view, device)
            sums.append(torch.cat([_check(teacher(x_BCHW)).float() for x_BCHW in images]))
    return Answers(torch.stack(sums).mean(0))


def _check(output: Any) -> Tensor:
    """Refuse answers of which an image has not one vector."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise TrainingError(
            "a teacher that is asked beforehand says one vector an image; this one does not: set "
            "callbacks.distil.views=0"
        )
    return output
