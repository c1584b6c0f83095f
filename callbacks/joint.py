"""All levels are trained at once."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from elastic.callbacks.levels import TrainLevels, get_levels
from torch import Tensor

from elastic.errors import TrainingError
from elastic.training.classifier import ElasticClassifier


class TrainJointly(TrainLevels):
    """Sandwich rule with in-place distillation: Yu & Huang, arXiv 1903.05134, sections 3.1 and 3.3.

    In every step the network learns from the labels; the smallest level and `between` others, drawn at
    random, learn from what the network says. Their losses are summed.

    Args:
        between: levels a step that are neither the smallest nor the network.
        **nest: see `Nest`.

    Raises:
        TrainingError: `between` is no number of levels.

    Example::

        TrainJointly([0.512, 0.64, 0.8])
    """

    def __init__(self, *args: Any, between: int = 2, **nest: Any) -> None:
        super().__init__(*args, **nest)
        if between < 0:
            raise TrainingError(f"there cannot be {between} levels between: set between to 0 or more")
        self.between = between

    def on_train_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        levels = get_levels(pl_module)
        pl_module.loss_terms["levels"] = lambda x_BCHW, logits_BK: self._distil(pl_module, x_BCHW, logits_BK)
        pl_module.others = range(len(levels) - 1)
        often = min(1.0, self.between / max(1, len(levels) - 2))
        pl_module.executed = [(net, 1.0 if k == 0 else often) for k, net in enumerate(levels[:-1])]
        pl_module.executed.append((levels.net, 1.0))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        levels = get_levels(pl_module)
        if trainer.global_step == 0:
            self.order(trainer, pl_module, len(levels) - 1)
            for k in reversed(range(len(levels) - 1)):
                levels.copy_norms(k)

    def _distil(self, pl_module: ElasticClassifier, x_BCHW: Tensor, logits_BK: Tensor) -> Tensor:
        levels = get_levels(pl_module)
        soft_BK = logits_BK.detach().softmax(1)
        chosen = [0, *(1 + torch.randperm(len(levels) - 2)[: self.between]).tolist()]
        losses = [F.cross_entropy(levels.run(k, x_BCHW), soft_BK) for k in chosen]
        return torch.stack(losses).sum()
