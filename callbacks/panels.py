"""What a dashboard wants to see beside scalars: sample images, and how gates and kernels are spread."""

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from elastic.dynamic.modules import iterate_modules
from elastic.pruning import gates
from elastic.training.classifier import ElasticClassifier

SAMPLES = 16


class LogPanels(L.Callback):
    """Logs to W&B what `experiments.dashboard` has panels for; with another logger it does nothing.

    Once: training images as the network sees them before augmentation. In every epoch: histograms of the
    gates' scores (a gate is open where its score is positive), and of the part of the last validation batch
    for which each kernel was on.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        if isinstance(trainer.logger, WandbLogger) and trainer.is_global_zero and trainer.current_epoch == 0:
            x_BCHW, y_B = trainer.datamodule.sample(SAMPLES, pl_module.seed)  # type: ignore[attr-defined]
            low, high = x_BCHW.amin((2, 3), keepdim=True), x_BCHW.amax((2, 3), keepdim=True)
            shown = list(((x_BCHW - low) / (high - low).clamp(min=1e-6)).unbind())
            trainer.logger.log_image("samples", shown, caption=[str(int(y)) for y in y_B])

    def on_validation_end(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        if (
            not isinstance(trainer.logger, WandbLogger)
            or trainer.sanity_checking
            or not trainer.is_global_zero
        ):
            return
        import wandb

        found = {name: values for name, values in spread(pl_module).items() if len(values)}
        if found:
            histograms = {name: wandb.Histogram(values.tolist()) for name, values in found.items()}
            place = {"epoch": trainer.current_epoch, "trainer/global_step": trainer.global_step}
            trainer.logger.experiment.log({**histograms, **place})


@torch.no_grad()
def spread(pl_module: ElasticClassifier) -> dict[str, Tensor]:
    """The scores of all gates, and how often each kernel was on in the last batch; empty without any."""
    scores = [gate.score.flatten().float().cpu() for _, _, gate in gates.iterate_gates(pl_module.net)]
    duty = [module.active_BK.mean(0).float().cpu() for module in iterate_modules(pl_module)]
    return {
        "gates/score": torch.cat(scores) if scores else torch.empty(0),
        "engaged/duty": torch.cat(duty) if duty else torch.empty(0),
    }
