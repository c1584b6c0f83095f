"""Train all levels at once."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from elastic.callbacks.base import StepNetwork
from elastic.callbacks.levels import TrainLevels
from elastic.ranges import Natural, checked
from elastic.training.imitation import OutputKind, check_outputs, compare_outputs


@checked
class TrainJointly(TrainLevels):
    """Train by the sandwich rule with in-place distillation: Yu & Huang, arXiv 1903.05134, 3.1 and 3.3.

    In every step the network learns from the labels; the smallest level and `between` others, drawn at
    random, learn from what the network says. Their losses are summed.

    Args:
        between: levels a step that are neither the smallest nor the network.
        outputs: what the network says: "classes" (scores in dimension 1), "labels" (a score each) or
            "values" (regression); what the module's task says, else classes, by default.
        **levels: see `TrainLevels`.

    Raises:
        OptionError: `between` is no number of levels.

    Example::

        TrainJointly([0.512, 0.64, 0.8])
    """

    def __init__(
        self, *args: Any, between: Natural = 2, outputs: OutputKind | None = None, **levels: Any
    ) -> None:
        super().__init__(*args, **levels)
        check_outputs(outputs)
        self.between, self.outputs = between, outputs

    def list_step_networks(self) -> Sequence[StepNetwork]:
        """List all levels; those between are executed in a part of the steps."""
        smallest, *between, largest = self.levels
        times = min(1.0, self.between / max(1, len(between)))
        return [
            StepNetwork(smallest),
            *(StepNetwork(level, times) for level in between),
            StepNetwork(largest),
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.structure.extra_levels = range(len(self.levels) - 1)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self.rank_level(trainer, len(self.levels) - 1)
            for k in reversed(range(len(self.levels) - 1)):
                self.levels.copy_norms(k)

    def compute_loss(self, output: Any, *inputs: Any, **named: Any) -> Tensor:
        """Return what the levels drawn for this step lose against the network's own output."""
        levels = [0, *(1 + torch.randperm(len(self.levels) - 2)[: self.between]).tolist()]
        outputs = self.outputs or self.structure.outputs
        answers = (self.structure.run(k, *inputs, **named) for k in levels)
        losses = [compare_outputs(answer, output, outputs) for answer in answers]
        return torch.stack(losses).sum()
