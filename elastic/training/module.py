"""Train a network for a task: the recipe of this library's own runs, one user of `Structure` among others."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, Metric

from elastic.errors import DataError, TrainingError
from elastic.surgery.layout import lay_out_images
from elastic.training.history import follow_loading
from elastic.training.schedules import Scheduler, make_schedule, read_plan, replan
from elastic.training.structure import Structure
from elastic.training.tasks import Classification, Task

Batch = tuple[Tensor, Tensor]  # x_BCHW, targets
PARTS = ("val", "test")
LARGEST = 1e4  # of a pixel, in standard deviations


class ElasticModule(L.LightningModule):
    """Train a network for a task.

    Args:
        net: any CNN, x_BCHW -> outputs of the task.
        shape: (C, H, W) of an input.
        task: the loss that the network learns by and the metrics that it is judged by.
        optimizer: parameter groups -> optimizer.
        scheduler: optimizer -> scheduler; told the number of steps where it asks for one.
        seed: all randomness of an epoch follows from it and the epoch, so that a resumed run is the same.
    """

    def __init__(
        self,
        net: nn.Module,
        shape: tuple[int, int, int],
        task: Task,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., Scheduler] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.net, self.task, self.seed = net, task, seed
        self.structure = Structure(net, torch.zeros(1, *shape), seed, channels_last=True)
        self.structure.outputs, self.structure.compute_loss = task.outputs, task.compute_loss
        follow_loading(self, self.structure)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.train_loss = MeanMetric(nan_strategy="disable")  # a NaN must show
        self.train_metric = task.make_metrics()[task.metric]
        self.metrics = nn.ModuleDict({part: nn.ModuleDict(task.make_metrics()) for part in PARTS})
        self._level_metrics: dict[int, Metric] = {}
        self._plan: dict[str, Any] = {}  # of the learning rate's schedule
        self.structure.lay_out()

    def forward(self, x_BCHW: Tensor) -> Any:
        return self.net(lay_out_images(x_BCHW, self.structure.memory_format))

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Look at the first images and at the weights, so that training is not blamed for what comes to it.

        Raises:
            DataError: the images are not finite.
            TrainingError: the weights are not, before anything has been trained.
        """
        if not self.trainer.sanity_checking or batch_idx:
            return
        _check_images(batch[0])
        if not all(parameter.isfinite().all() for parameter in self.net.parameters()):
            raise TrainingError("weights are not finite before training: start from another run")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.trainer.global_step == 0:  # there may have been no validation before
            _check_images(batch[0])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x_BCHW, targets = batch
        x_BCHW, mixed = self.task.mix(x_BCHW, targets)
        outputs = self(x_BCHW)
        loss = self.task.compute_training_loss(outputs, mixed)
        self.train_loss.update(loss.detach())
        with torch.no_grad():
            self.train_metric.update(*self.task.predict(outputs, targets))
        self.log("train/loss_step", loss.detach())
        return loss

    def on_validation_epoch_start(self) -> None:
        self._level_metrics = self._make_level_metrics()
        self._log_training()

    def on_test_epoch_start(self) -> None:
        self._level_metrics = self._make_level_metrics()

    def on_train_epoch_end(self) -> None:
        self._log_training()  # of an epoch without validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._log_levels("val")

    def on_test_epoch_end(self) -> None:
        self._log_levels("test")

    def _evaluate(self, batch: Batch, part: str) -> None:
        x_BCHW, targets = batch
        outputs = self(x_BCHW)
        self.log(f"{part}/loss", self.task.compute_loss(outputs, targets), on_epoch=True, sync_dist=True)
        predictions = self.task.predict(outputs, targets)
        for name, metric in cast(Mapping[str, Mapping[str, Metric]], self.metrics)[part].items():
            metric.update(*predictions)
            self.log(
                f"{part}/{name}", metric, on_epoch=True, on_step=False, prog_bar=name == self.task.metric
            )
        for k, metric in self._level_metrics.items():
            metric.update(*self.task.predict(self.structure.run(k, x_BCHW), targets))

    def _make_level_metrics(self) -> dict[int, Metric]:
        """Make a metric for each level that is evaluated beside the network; all are in one process."""
        levels = self.structure.extra_levels
        return {k: self.task.make_metrics()[self.task.metric].to(self.device) for k in levels}

    def _log_levels(self, part: str) -> None:
        for k, metric in self._level_metrics.items():
            self.log(f"{part}/{self.task.metric}/level{k}", metric.compute())

    def setup(self, stage: str) -> None:
        self.structure.trainer = self.trainer
        self.structure.lay_out()

    def on_train_start(self) -> None:
        """Let the schedule last as long as the run does now: a checkpoint may be of a shorter one."""
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, LRScheduler) and read_plan(scheduler) != self._plan:
                assert self.make_scheduler is not None
                config.scheduler = replan(self.make_scheduler, scheduler, self._plan)

    def on_train_epoch_start(self) -> None:
        rank = [self.global_rank] if self.global_rank else []  # each process draws its own augmentation
        L.seed_everything(self.structure.make_seed(self.current_epoch, 0, *rank), verbose=False)

    def _log_training(self) -> None:
        """Log the training epoch's figures, with the validation's if any: callbacks then find both."""
        if (
            self.trainer.sanity_checking
            or self.trainer.state.fn != "fit"
            or not self.train_loss.update_called
        ):
            return
        loss, metric = self.train_loss.compute(), self.train_metric.compute()
        self.train_loss.reset()
        self.train_metric.reset()
        if not torch.isfinite(loss) or not all(p.isfinite().all() for p in self.net.parameters()):
            halves = self.trainer.precision == "16-true"  # too few bits for what Adam divides by
            remedy = "set trainer.precision=16-mixed" if halves else "lower optimizer.lr"
            saved = "; the epochs before are saved" if self.current_epoch else ""
            raise TrainingError(
                f"training diverged, the loss is {loss.item():.3g} in epoch {self.current_epoch}: "
                f"{remedy}{saved}"
            )
        self.log_dict({"train/loss": loss, f"train/{self.task.metric}": metric}, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Let weights decay; norms and biases do not."""
        weights = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        optimizer = self.make_optimizer([{"params": weights}, {"params": others, "weight_decay": 0.0}])
        if self.make_scheduler is None:
            return optimizer
        self.trainer.fit_loop.setup_data()  # which bounds in steps or time leave for later
        steps, batches = self.trainer.estimated_stepping_batches, self.trainer.num_training_batches
        # Lightning says -1 where data has no length.
        steps = self.structure.schedule_fraction * steps if steps >= 0 else math.inf
        schedule = make_schedule(self.make_scheduler, optimizer, steps, batches)
        self._plan = read_plan(schedule["scheduler"])  # type: ignore[arg-type]
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class ElasticClassifier(ElasticModule):
    """Train a classifier of K classes; see `ElasticModule`."""

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
        super().__init__(net, shape, Classification(classes, label_smoothing), optimizer, scheduler, seed)


def _check_images(x_BCHW: Tensor) -> None:
    """Refuse images that no network can look at.

    Raises:
        DataError: they are not finite, or beyond all measure.
    """
    largest = float(x_BCHW.detach().abs().max())
    if not largest < LARGEST:  # nor is NaN
        raise DataError(f"images are as large as {largest:.1e} normalised: set data.mean and data.std")
