"""Log what a dashboard wants to see beside scalars: sample images, and how gates and kernels are spread."""

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from elastic.callbacks.base import ElasticCallback
from elastic.dynamic.modules import iterate_modules
from elastic.pruning.gates import iterate_gates
from elastic.training.samples import sample_batch
from elastic.training.structure import Structure

SAMPLES = 16
PIXELS = 64  # smaller images are enlarged, so that they can be seen


class LogPanels(ElasticCallback):
    """Log to W&B what `experiments.dashboard` has panels for; with another logger do nothing.

    Once: training images as the network sees them before augmentation. In every epoch: histograms of the
    gates' scores (a gate is open where its score is positive), and of the part of the last validation batch
    for which each kernel was on.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in self._list_loggers(trainer):
            if trainer.current_epoch == 0:
                x_BCHW, y_B = sample_batch(trainer, SAMPLES, self.structure.seed)
                captions = [describe_target(target) for target in y_B]
                logger.log_image("samples", make_visible(x_BCHW), caption=captions)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for logger in self._list_loggers(trainer):
            import wandb

            spread = {name: values for name, values in collect_spread(self.structure).items() if len(values)}
            if spread:
                histograms = {name: wandb.Histogram(values.tolist()) for name, values in spread.items()}
                place = {"epoch": trainer.current_epoch, "trainer/global_step": trainer.global_step}
                logger.experiment.log({**histograms, **place})

    def _list_loggers(self, trainer: L.Trainer) -> list[WandbLogger]:
        return [
            logger for logger in trainer.loggers if isinstance(logger, WandbLogger) and trainer.is_global_zero
        ]


def describe_target(target: Tensor) -> str:
    """Write what is told of an image, or of a mask the classes that are in it."""
    values = target.unique() if target.dim() > 1 else target.flatten()
    return ", ".join(f"{value:g}" for value in values.tolist())


def make_visible(x_BCHW: Tensor) -> list[Tensor]:
    """Return images scaled to [0, 1], small ones enlarged pixel by pixel."""
    low, high = x_BCHW.amin((2, 3), keepdim=True), x_BCHW.amax((2, 3), keepdim=True)
    shown = (x_BCHW - low) / (high - low).clamp(min=1e-6)
    factor = max(1, PIXELS // max(shown.shape[2:]))
    return list(F.interpolate(shown, scale_factor=factor, mode="nearest").unbind())


@torch.no_grad()
def collect_spread(structure: Structure) -> dict[str, Tensor]:
    """Collect the scores of all gates, and how often each kernel was on in the last batch."""
    scores = [gate.score.flatten().float().cpu() for _, _, gate in iterate_gates(structure.net)]
    modules = iterate_modules(structure.kernel_modules) if structure.dynamic_nets else ()
    usage = [module.active_BK.mean(0).float().cpu() for module in modules]
    return {
        "gates/score": torch.cat(scores) if scores else torch.empty(0),
        "dynamic/usage": torch.cat(usage) if usage else torch.empty(0),
    }
