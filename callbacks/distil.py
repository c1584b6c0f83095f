"""Let the network also learn from what another network says."""

from collections.abc import Sequence

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.callbacks.base import ElasticCallback, StepNetwork
from elastic.errors import TrainingError
from elastic.ranges import Positive, checked
from elastic.widths.tracing import preserve_modes


@checked
class Distil(ElasticCallback):
    """Distil knowledge: Hinton et al., arXiv 1503.02531. For runs that make a trained network cheaper.

    Adds weight · T² · KL(teacher ‖ network) of the classes' probabilities at temperature T to the loss.

    Args:
        teacher: a network for the same images and classes; it stays as it is.
        weight: of the teacher beside the labels, which weigh 1.
        temperature: T; the higher it is, the more the classes count that the teacher thinks unlikely.

    Raises:
        OptionError: no weight or no temperature.
        TrainingError: a teacher that knows another number of classes, or cannot look at the images.

    Example::

        Distil(resnet56(), weight=1.0, temperature=4.0)
    """

    def __init__(self, teacher: nn.Module, weight: Positive = 1.0, temperature: Positive = 4.0) -> None:
        self.weight, self.temperature = weight, temperature
        self.teacher = teacher.eval().requires_grad_(False)

    def list_step_networks(self) -> Sequence[StepNetwork]:
        """List the teacher, which is executed in a training step and not trained."""
        return [StepNetwork(self.teacher, trained=False)]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._check()

    @torch.no_grad()
    def _check(self) -> None:
        net, example = self.structure.net, self.structure.example
        x = torch.zeros(1, *example.shape[1:], dtype=example.dtype)
        try:
            known = self.teacher.cpu()(x).shape[1]
        except RuntimeError as error:
            raise TrainingError(
                f"the teacher cannot look at images of {tuple(x.shape[1:])}: name the run of one that can"
            ) from error
        with preserve_modes(net):
            classes = net.eval().forward(x.to(next(net.parameters()).device)).shape[1]
        if known != classes:
            raise TrainingError(f"the teacher knows {known} classes of {classes}: name the run of another")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        place = {"device": pl_module.device, "dtype": next(self.structure.net.parameters()).dtype}
        self.teacher.to(**place, memory_format=self.structure.memory_format)  # type: ignore[call-overload]

    def compute_loss(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the loss against the teacher's output for the same images."""
        with torch.no_grad():
            teacher_BK = F.log_softmax(self.teacher(x).float() / self.temperature, dim=1)
        network_BK = F.log_softmax(output.float() / self.temperature, dim=1)
        divergence = F.kl_div(network_BK, teacher_BK, reduction="batchmean", log_target=True)
        return self.weight * self.temperature**2 * divergence
