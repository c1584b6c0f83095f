"""The network also learns from what the network that the run starts from says."""

import copy

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.module import ElasticModule, TrainingError


class Distil(L.Callback):
    """Knowledge distillation: Hinton et al., arXiv 1503.02531. For runs that make a trained network cheaper.

    Adds weight · T² · KL(teacher ‖ network) of the classes' probabilities at temperature T to the loss. The
    teacher is the network as the run starts, before anything of it changes; it stays as it is.

    Args:
        init: the run that the network comes from, as in the configuration.
        weight: of the teacher beside the labels, which weigh 1.
        temperature: T; the higher it is, the more the classes count that the teacher thinks unlikely.

    Raises:
        TrainingError: `init` is None, so that the teacher would know nothing; no weight or no temperature.

    Example::

        Distil(init="outputs/dense", weight=1.0, temperature=4.0)
    """

    def __init__(self, init: str | None, weight: float = 1.0, temperature: float = 4.0) -> None:
        if init is None:
            raise TrainingError("there is nobody to learn from: set init=<folder of a finished run>")
        if weight <= 0 or temperature <= 0:
            raise TrainingError(f"distil by {weight:g} at temperature {temperature:g}: both must be above 0")
        self.weight, self.temperature = weight, temperature
        self.teacher: nn.Module | None = None

    def setup(self, trainer: L.Trainer, pl_module: ElasticModule, stage: str) -> None:  # type: ignore[override]
        if stage == "fit":  # a checkpoint is loaded later
            self.teacher = copy.deepcopy(pl_module.net).eval().requires_grad_(False)

    def on_train_start(self, trainer: L.Trainer, pl_module: ElasticModule) -> None:  # type: ignore[override]
        assert self.teacher is not None
        teacher = self.teacher.to(pl_module.device, memory_format=pl_module.memory_format)  # type: ignore[call-overload]
        pl_module.asked = [teacher]
        pl_module.loss_terms["distil"] = lambda x_BCHW, logits_BK: self.loss(logits_BK, teacher, x_BCHW)

    def loss(self, logits_BK: Tensor, teacher: nn.Module, x_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            asked_BK = F.log_softmax(teacher(x_BCHW).float() / self.temperature, dim=1)
        given_BK = F.log_softmax(logits_BK.float() / self.temperature, dim=1)
        apart = F.kl_div(given_BK, asked_BK, reduction="batchmean", log_target=True)
        return self.weight * self.temperature**2 * apart
