"""Let the network also learn from what another network says."""

import inspect
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from elastic.callbacks.base import ElasticCallback, StepNetwork
from elastic.errors import TrainingError
from elastic.ranges import Natural, Positive, checked
from elastic.surgery.layout import lay_out_weights
from elastic.training.answers import Answers, ask_teacher
from elastic.training.imitation import (
    OutputKind,
    check_outputs,
    compare_outputs,
    find_output_shapes,
    find_training_shapes,
)
from elastic.training.samples import count_samples
from elastic.widths.inputs import select_samples
from elastic.widths.mode import set_mode


@checked
class Distil(ElasticCallback):
    """Distil knowledge: Hinton et al., arXiv 1503.02531. For runs that make a trained network cheaper.

    Adds weight · T² · KL(teacher ‖ network) of the classes' (or labels') probabilities at temperature T to
    the loss; of values, weight times the mean squared difference.

    Args:
        teacher: a network for the same images and targets; it stays as it is.
        weight: of the teacher beside the targets, which weigh 1.
        temperature: T; the higher it is, the more the classes count that the teacher thinks unlikely.
        outputs: what both networks say: "classes" (scores in dimension 1), "labels" (a score each) or
            "values" (regression); what the module's task says, else classes, by default.
        views: above 0, the teacher is asked before training alone, about so many augmented views of each
            training image; in each step its mean answer about the image stands for one about the view.

    Raises:
        OptionError: no weight, no temperature, or no such outputs.
        TrainingError: a teacher whose outputs have other shapes, or that cannot look at the images; one that
            is to be asked before training about images that are then mixed, or whose order is not known.

    Example::

        Distil(resnet56(), weight=1.0, temperature=4.0)
    """

    def __init__(
        self,
        teacher: nn.Module,
        weight: Positive = 1.0,
        temperature: Positive = 4.0,
        outputs: OutputKind | None = None,
        views: Natural = 0,
    ) -> None:
        check_outputs(outputs)
        self.weight, self.temperature, self.outputs = weight, temperature, outputs
        self.views = views
        self.answers: Answers | None = None
        self.teacher = set_mode(teacher).requires_grad_(False)

    def list_step_networks(self) -> Sequence[StepNetwork]:
        """List the teacher, which is executed in a training step, or before all, and not trained."""
        trainer = self.structure.trainer
        epochs = (trainer.max_epochs or 0) if trainer is not None else 0
        times = self.views / (epochs if epochs > 0 else self.views) if self.views else 1.0
        return [StepNetwork(self.teacher, times, trained=False)]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._check()
            if self.views and getattr(getattr(pl_module, "task", None), "mixup", 0):
                raise TrainingError(
                    "a teacher that is asked before training has not seen images mixed: set task.mixup=0 or "
                    "callbacks.distil.views=0"
                )

    def _check(self) -> None:
        inputs = [torch.zeros_like(x) for x in select_samples(self.structure.example, slice(1))]
        # It may come from a run in another precision.
        self.teacher.to(next(self.structure.net.parameters()).dtype)
        try:
            teacher_shapes = find_output_shapes(self.teacher, inputs)
        except (RuntimeError, ValueError, AssertionError) as error:  # as networks say it themselves
            images = " and ".join(str(tuple(x.shape[1:])) for x in inputs)
            raise TrainingError(
                f"the teacher cannot look at images of {images}: name the run of one that can"
            ) from error
        shapes = find_output_shapes(self.structure.net, inputs)
        if teacher_shapes != shapes:
            raise TrainingError(
                f"the teacher's outputs for an image are of {', '.join(map(str, teacher_shapes))}, the "
                f"network's of {', '.join(map(str, shapes))}: name the run of another"
            )
        trained = find_training_shapes(self.structure.net, inputs)
        own = [shape[1:] for shape in shapes]
        if trained is not None and trained[: len(own)] != own:
            raise TrainingError(
                f"the network's outputs are of {', '.join(map(str, trained))} in training, and of "
                f"{', '.join(map(str, own))} in evaluation, as the teacher's: let those in training begin "
                "with these"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.teacher.to(pl_module.device, next(self.structure.net.parameters()).dtype)
        lay_out_weights(self.teacher, self.structure.memory_format)
        if self.views:
            self.answers = ask_teacher(trainer, self.structure, self.teacher, self.views)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.answers is not None:
            self.answers.begin_epoch(trainer.train_dataloader)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.answers is not None:
            self.answers.begin_batch(trainer.train_dataloader)

    def compute_loss(self, output: Any, *inputs: Any, **named: Any) -> Tensor:
        """Return the loss against the teacher's output for the same images, or its mean answer about them."""
        answers = self.answers
        target = self._ask(*inputs, **named) if answers is None else answers.find(count_samples(output))
        outputs = self.outputs or self.structure.outputs
        cross_entropy, entropy = (
            compare_outputs(logits, target, outputs, self.temperature) for logits in (output, target)
        )
        return self.weight * (cross_entropy - entropy)

    @torch.no_grad()
    def _ask(self, *inputs: Any, **named: Any) -> Any:
        """Return the teacher's output for the inputs of a call."""
        if named:  # the teacher may have others for them
            call = inspect.signature(self.structure.net.forward).bind(*inputs, **named)
            inputs, named = call.args, call.kwargs
        return self.teacher(*inputs, **named)
