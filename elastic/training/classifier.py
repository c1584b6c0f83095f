"""Train a classifier: the recipe of this library's own runs, one user of `Structure` among others."""

import math
from collections.abc import Callable

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from elastic.errors import DataError, TrainingError
from elastic.training.schedules import Scheduler, make_schedule
from elastic.training.structure import Structure

Batch = tuple[Tensor, Tensor]  # x_BCHW, y_B


class ElasticClassifier(L.LightningModule):
    """Train a network by the cross entropy of its classes.

    Args:
        net: any CNN, x_BCHW -> logits_BK.
        shape: (C, H, W) of an input.
        classes: K.
        optimizer: parameter groups -> optimizer.
        scheduler: optimizer -> scheduler; told the number of steps where it asks for one.
        seed: all randomness of an epoch follows from it and the epoch, so that a resumed run is the same.
    """

    def __init__(
        self,
        net: nn.Module,
        shape: tuple[int, int, int],
        classes: int,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., Scheduler] | None = None,
        seed: int = 0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.net, self.seed, self.label_smoothing = net, seed, label_smoothing
        self.structure = Structure(net, torch.zeros(1, *shape), seed, channels_last=True)
        self.register_load_state_dict_pre_hook(self.structure.prepare_load)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.train_loss = MeanMetric(nan_strategy="disable")  # a NaN must show
        self.train_acc, self.val_acc, self.test_acc = (_make_accuracy(classes) for _ in range(3))
        self.structure.lay_out()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.net(x_BCHW.contiguous(memory_format=self.structure.memory_format))
        return logits_BK

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Look at the first images and at the weights, so that training is not blamed for what comes to it.

        Raises:
            DataError: the images are not finite.
            TrainingError: the weights are not, before anything has been trained.
        """
        if not self.trainer.sanity_checking or batch_idx:
            return
        if not batch[0].isfinite().all():
            raise DataError("images are not finite once they are normalised: look at data.mean and data.std")
        if not all(parameter.isfinite().all() for parameter in self.net.parameters()):
            raise TrainingError("weights are not finite before training: start from another run")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x_BCHW, y_B = batch
        logits_BK = self(x_BCHW)
        loss = F.cross_entropy(logits_BK, y_B, label_smoothing=self.label_smoothing)
        self.train_loss.update(loss.detach())
        self.train_acc.update(logits_BK.detach(), y_B)
        self.log("train/loss_step", loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_acc)

    def _evaluate(self, batch: Batch, part: str, accuracy: MulticlassAccuracy) -> None:
        x_BCHW, y_B = batch
        logits_BK = self(x_BCHW)
        accuracy.update(logits_BK, y_B)
        self.log(f"{part}/acc", accuracy, on_epoch=True, on_step=False, prog_bar=True)
        self.log(f"{part}/loss", F.cross_entropy(logits_BK, y_B), on_epoch=True, sync_dist=True)
        for k in self.structure.extra_levels:
            correct = (self.structure.run(k, x_BCHW).argmax(1) == y_B).float().mean()
            self.log(f"{part}/acc/level{k}", correct, on_epoch=True, batch_size=len(y_B))

    def setup(self, stage: str) -> None:
        self.structure.trainer = self.trainer
        self.structure.lay_out()

    def on_train_epoch_start(self) -> None:
        rank = [self.global_rank] if self.global_rank else []  # each process draws its own augmentation
        L.seed_everything(self.structure.make_seed(self.current_epoch, 0, *rank), verbose=False)

    def on_validation_epoch_start(self) -> None:
        """Log the training epoch's figures with the validation's: callbacks then find both."""
        if (
            self.trainer.sanity_checking
            or self.trainer.state.fn != "fit"
            or not self.train_loss.update_called
        ):
            return
        loss, accuracy = self.train_loss.compute(), self.train_acc.compute()
        self.train_loss.reset()
        self.train_acc.reset()
        if not torch.isfinite(loss) or not all(p.isfinite().all() for p in self.net.parameters()):
            saved = "; the epochs before are saved" if self.current_epoch else ""
            raise TrainingError(
                f"training diverged, the loss is {loss.item():.3g} in epoch {self.current_epoch}: "
                f"lower optimizer.lr{saved}"
            )
        self.log_dict({"train/loss": loss, "train/acc": accuracy}, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Let weights decay; norms and biases do not."""
        weights = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        optimizer = self.make_optimizer([{"params": weights}, {"params": others, "weight_decay": 0.0}])
        if self.make_scheduler is None:
            return optimizer
        steps, batches = self.trainer.estimated_stepping_batches, self.trainer.num_training_batches
        if not (math.isfinite(steps) and math.isfinite(batches)):
            raise TrainingError(
                "a schedule lasts as long as the run, whose end is not known: set trainer.max_epochs and, "
                "where the data has no length, trainer.limit_train_batches; or lr_scheduler=constant"
            )
        steps = round(steps * self.structure.schedule_fraction)
        schedule = make_schedule(self.make_scheduler, optimizer, steps, int(batches))
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def _make_accuracy(classes: int) -> MulticlassAccuracy:
    """Make a metric that does not read labels back from the device to check them in each step."""
    return MulticlassAccuracy(classes, average="micro", validate_args=False)
