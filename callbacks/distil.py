"""The network also learns from what another network says."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.errors import TrainingError
from elastic.training.classifier import ElasticClassifier


class Distil(L.Callback):
    """Knowledge distillation: Hinton et al., arXiv 1503.02531. For runs that make a trained network cheaper.

    Adds weight · T² · KL(teacher ‖ network) of the classes' probabilities at temperature T to the loss.

    Args:
        teacher: a network for the same images and classes; it stays as it is.
        weight: of the teacher beside the labels, which weigh 1.
        temperature: T; the higher it is, the more the classes count that the teacher thinks unlikely.

    Raises:
        TrainingError: no weight or no temperature; a teacher that knows another number of classes, or cannot
            look at the images.

    Example::

        Distil(resnet56(), weight=1.0, temperature=4.0)
    """

    def __init__(self, teacher: nn.Module, weight: float = 1.0, temperature: float = 4.0) -> None:
        if weight <= 0 or temperature <= 0:
            raise TrainingError(f"distil by {weight:g} at temperature {temperature:g}: both must be above 0")
        self.weight, self.temperature = weight, temperature
        self.teacher = teacher.eval().requires_grad_(False)

    def setup(self, trainer: L.Trainer, pl_module: ElasticClassifier, stage: str) -> None:  # type: ignore[override]
        if stage == "fit":
            self._check(pl_module)

    def _check(self, pl_module: ElasticClassifier) -> None:
        shape, classes = tuple(pl_module.example.shape[1:]), pl_module.val_acc.num_classes
        try:
            knows = self.teacher.cpu()(torch.zeros(1, *shape)).shape[1]
        except RuntimeError as error:
            raise TrainingError(
                f"the teacher cannot look at images of {shape}: name the run of one that can"
            ) from error
        if knows != classes:
            raise TrainingError(f"the teacher knows {knows} classes of {classes}: name the run of another")

    def on_train_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        teacher = self.teacher.to(pl_module.device, memory_format=pl_module.memory_format)  # type: ignore[call-overload]
        pl_module.asked = [teacher]
        pl_module.loss_terms["distil"] = lambda x_BCHW, logits_BK: self.loss(logits_BK, teacher, x_BCHW)

    def loss(self, logits_BK: Tensor, teacher: nn.Module, x_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            asked_BK = F.log_softmax(teacher(x_BCHW).float() / self.temperature, dim=1)
        given_BK = F.log_softmax(logits_BK.float() / self.temperature, dim=1)
        apart = F.kl_div(given_BK, asked_BK, reduction="batchmean", log_target=True)
        return self.weight * self.temperature**2 * apart
