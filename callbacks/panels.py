"""Log what a dashboard wants to see beside scalars: sample images, and how gates and kernels are spread."""

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from elastic.callbacks.base import ElasticCallback
from elastic.dynamic.modules import iterate_modules
from elastic.pruning.gates import iterate_gates
from elastic.training.kinds import is_kind
from elastic.training.samples import take_samples
from elastic.training.structure import Structure
from elastic.widths.inputs import list_inputs

PanelLogger = WandbLogger | TensorBoardLogger
SAMPLES = 16
PIXELS = 64  # smaller images are enlarged, so that they can be seen
CHANNELS = (1, 3, 4)  # of a picture


class LogPanels(ElasticCallback):
    """Log images and histograms to W&B or TensorBoard; with another logger do nothing.

    Once: training images as the network sees them before augmentation, where its first input is images. In
    every epoch: histograms of the gates' scores (a gate is open where its score is positive), and of the part
    of the last validation batch for which each kernel was on.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for logger in self._list_loggers(trainer):
            if trainer.current_epoch == 0:
                x, y_B = take_samples(trainer, SAMPLES, self.structure.seed)
                images = make_visible(list_inputs(x)[0])
                captions = [""] * len(images) if y_B is None else [describe_target(target) for target in y_B]
                if images:
                    log_samples(logger, images, captions)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loggers = [] if trainer.sanity_checking else self._list_loggers(trainer)
        spread = collect_spread(self.structure) if loggers else {}
        for logger in loggers:
            log_histograms(logger, spread, trainer.current_epoch, trainer.global_step)

    def _list_loggers(self, trainer: L.Trainer) -> list[PanelLogger]:
        loggers = trainer.loggers if trainer.is_global_zero else []
        return [
            logger for logger in loggers if is_kind(logger, WandbLogger) or is_kind(logger, TensorBoardLogger)
        ]


def log_samples(logger: PanelLogger, images: list[Tensor], captions: list[str]) -> None:
    """Log images with what is told of them."""
    if is_kind(logger, WandbLogger):
        logger.log_image("samples", images, caption=captions)
    else:
        logger.experiment.add_images("samples", torch.stack(images))
        logger.experiment.add_text("samples", "; ".join(captions))


def log_histograms(logger: PanelLogger, spread: dict[str, Tensor], epoch: int, step: int) -> None:
    """Log how values are spread, as far as there are any."""
    nonempty = {name: values for name, values in spread.items() if len(values)}
    if is_kind(logger, TensorBoardLogger):
        for name, values in nonempty.items():
            logger.experiment.add_histogram(name, values, step)
    elif nonempty:
        import wandb

        histograms = {name: wandb.Histogram(values.tolist()) for name, values in nonempty.items()}
        logger.experiment.log({**histograms, "epoch": epoch, "trainer/global_step": step})


def describe_target(target: Tensor) -> str:
    """Write what is told of an image, or of a mask the classes that are in it."""
    values = target.unique() if target.dim() > 1 else target.flatten()
    return ", ".join(f"{value:g}" for value in values.tolist())


def make_visible(x_BCHW: Tensor) -> list[Tensor]:
    """Return images scaled to [0, 1], small ones enlarged pixel by pixel; none of what is no image.

    Of channels that make no picture the first three are shown, or the first.
    """
    if x_BCHW.dim() != 4:
        return []
    channels = x_BCHW.shape[1]
    x_BCHW = x_BCHW if channels in CHANNELS else x_BCHW[:, : 3 if channels > 3 else 1]
    low, high = x_BCHW.amin((2, 3), keepdim=True), x_BCHW.amax((2, 3), keepdim=True)
    scaled_BCHW = (x_BCHW - low) / (high - low).clamp(min=1e-6)
    factor = max(1, PIXELS // max(scaled_BCHW.shape[2:]))
    return list(F.interpolate(scaled_BCHW, scale_factor=factor, mode="nearest").unbind())


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
