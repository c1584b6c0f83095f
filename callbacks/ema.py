"""What is validated, saved and kept is an average of the weights over the last steps."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from elastic.training.classifier import ElasticClassifier


class AverageWeights(EMAWeightAveraging):
    """Lightning's exponential moving average, for a network whose structure changes.

    The averaged network is one of `ElasticModule.copies`: what stays keeps its average, what is fresh starts
    as the model's. What is not trained has no average: frozen gates and counts are the model's.

    Arguments are Lightning's, and so are checkpoints: `state_dict` holds the average, `current_model_state`
    what is trained. Callbacks that stand before this one see the average at the end of a validation epoch.

    Example::

        AverageWeights(decay=0.99)
    """

    def setup(self, trainer: L.Trainer, pl_module: ElasticClassifier, stage: str) -> None:  # type: ignore[override]
        """Copies nothing yet: gates may still be attached, and a checkpoint may bring another structure."""
        self._release(pl_module)

    def on_load_checkpoint(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ElasticClassifier, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit":
            self._begin(trainer, pl_module)  # the model has the checkpoint's structure by now
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_fit_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        if self._average_model is None:
            self._begin(trainer, pl_module)
        else:  # a checkpoint is loaded before the model is brought to its device
            self._average_model.to(self._device or pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: ElasticClassifier, *args: Any) -> None:  # type: ignore[override]
        super().on_train_batch_end(trainer, pl_module, *args)
        self._take_untrained(pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        super().on_train_epoch_end(trainer, pl_module)  # it may average here, too
        self._take_untrained(pl_module)

    @torch.no_grad()
    def _take_untrained(self, pl_module: ElasticClassifier) -> None:
        """What has no average, or none yet, is the model's."""
        assert self._average_model is not None
        twin = self._average_model.module
        weights = zip(twin.parameters(), pl_module.parameters(), strict=True)
        buffers = zip(twin.buffers(), pl_module.buffers(), strict=True)
        begun = self._average_model.n_averaged > 0  # else there is no average yet
        frozen = [(average, now) for average, now in weights if not (now.requires_grad and begun)]
        counts = [(average, now) for average, now in buffers if not (now.is_floating_point() and begun)]
        for average, now in frozen + counts:
            average.copy_(now)

    def on_fit_end(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        """A finished run that is continued has nothing to train: Lightning's `on_train_end` is not called."""
        self._copy_average_to_current(pl_module)
        self._release(pl_module)

    def _begin(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:
        self._release(pl_module)
        own = pl_module.loss_terms, pl_module.copies
        pl_module.loss_terms, pl_module.copies = {}, []  # the copy has none
        super().setup(trainer, pl_module, "fit")
        pl_module.loss_terms, pl_module.copies = own
        pl_module.copies.append(self._network())

    def _release(self, pl_module: ElasticClassifier) -> None:
        if self._average_model is not None:
            pl_module.copies[:] = [net for net in pl_module.copies if net is not self._network()]
            self._average_model = None

    def _network(self) -> nn.Module:
        assert self._average_model is not None
        return self._average_model.module.net  # type: ignore[return-value]
