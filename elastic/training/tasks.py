"""Say what a network's outputs mean: the loss that it learns by, and the figures that it is judged by.

Shapes: B samples, K classes, labels or values, H rows, W columns; … further dimensions of dense targets.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassJaccardIndex,
    MultilabelAccuracy,
    MultilabelF1Score,
)
from torchmetrics.regression import R2Score

from elastic.errors import OptionError, TrainingError
from elastic.ranges import Range, checked
from elastic.training.imitation import OutputKind

Below1 = Annotated[float, Range(0, 1, below=True)]
UpToHalf = Annotated[float, Range(0, 0.5)]


class Task(ABC):
    """Describe a task; a subclass may be named by `task._target_`.

    Args:
        classes: K, of the data.
        metric: which of its metrics decisions go by (growth, a search, comparisons); more is better.

    Attributes:
        outputs: what a network says, for others that learn from it.

    Raises:
        OptionError: the task has no such metric.
    """

    outputs: ClassVar[OutputKind]

    def __init__(self, classes: int, metric: str) -> None:
        self.classes, self.metric = classes, metric
        names = list(self.make_metrics())
        if metric not in names:
            raise OptionError(f"{type(self).__name__} has no metric '{metric}': set {' or '.join(names)}")

    @abstractmethod
    def compute_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss of a batch.

        Raises:
            TrainingError: targets of another kind.
        """

    def compute_training_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss of a batch that is trained on, where it is another one."""
        return self.compute_loss(outputs, targets)

    def mix(self, x_BCHW: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the images of a batch that is trained on; return them with the targets of their loss."""
        return x_BCHW, targets

    @abstractmethod
    def make_metrics(self) -> Mapping[str, Metric]:
        """Make the metrics by name, each updated with predictions and targets as `predict` returns them."""

    def predict(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions and targets as metrics take them."""
        return outputs, targets

    def list_metrics(self) -> list[str]:
        """Name all metrics, that by which decisions are taken first."""
        return sorted(self.make_metrics(), key=lambda name: name != self.metric)


# Metrics do not check their input: that would read labels back from the device in each step.


@checked
class Classification(Task):
    """Tell one class of K: logits_BK, y_B.

    Args:
        label_smoothing: of the labels that are trained on.
        metric: acc, the part of the images that are classified right.
        mixup: the largest part that an image of a batch has of its neighbour's, and its label of the
            neighbour's; parts are drawn uniformly for each image (after Zhang et al., arXiv 1710.09412).

    Raises:
        OptionError: no part that labels could be smoothed by, or images be mixed with.
    """

    outputs = "classes"

    def __init__(
        self, classes: int, label_smoothing: Below1 = 0.0, metric: str = "acc", mixup: UpToHalf = 0.0
    ) -> None:
        super().__init__(classes, metric)
        self.label_smoothing, self.mixup = label_smoothing, mixup

    def compute_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return compute_class_loss(outputs, targets)

    def compute_training_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        if self.mixup:
            return F.cross_entropy(get_logits(outputs), targets, label_smoothing=self.label_smoothing)
        return compute_class_loss(outputs, targets, self.label_smoothing)

    def mix(self, x_BCHW: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not self.mixup:
            return x_BCHW, targets
        check_class_numbers(targets, (len(x_BCHW), self.classes))
        # Batches are shuffled: whichever image stands beside another is one drawn at random.
        part_B = torch.rand(len(x_BCHW), device=x_BCHW.device) * self.mixup
        labels_BK = torch.zeros(len(targets), self.classes, device=targets.device)
        labels_BK.scatter_(1, targets[:, None], 1.0)
        mixed_BCHW = x_BCHW.lerp(x_BCHW.roll(1, 0), part_B[:, None, None, None].to(x_BCHW.dtype))
        return mixed_BCHW, labels_BK.lerp(labels_BK.roll(1, 0), part_B[:, None])

    def make_metrics(self) -> Mapping[str, Metric]:
        return {"acc": MulticlassAccuracy(self.classes, average="micro", validate_args=False)}


class Multilabel(Task):
    """Tell for each of K labels whether it is there: logits_BK, y_BK of 0 and 1.

    Args:
        metric: acc, the part of the labels that are told right, or f1, averaged over labels.
    """

    outputs = "labels"

    def __init__(self, classes: int, metric: str = "acc") -> None:
        super().__init__(classes, metric)

    def compute_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        if targets.shape != outputs.shape:
            raise TrainingError(
                f"targets of shape {tuple(targets.shape)} stand against {tuple(outputs.shape)}: multilabel "
                "takes 0 or 1 for each label of each sample; set task=classification for class numbers"
            )
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))

    def make_metrics(self) -> Mapping[str, Metric]:
        return {
            "acc": MultilabelAccuracy(self.classes, average="micro", validate_args=False),
            "f1": MultilabelF1Score(self.classes, average="macro", validate_args=False),
        }

    def predict(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.sigmoid(), targets.long()


class Segmentation(Task):
    """Tell the class of each pixel: logits_BKHW (or a dict with them under `out`), y_BHW.

    Args:
        metric: acc, the part of the pixels that are told right, or iou, averaged over classes.
    """

    outputs = "classes"
    IGNORED = 255  # a class number that stands for none, in the masks of most data sets

    def __init__(self, classes: int, metric: str = "acc") -> None:
        super().__init__(classes, metric)

    def compute_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        logits_BKHW = get_logits(outputs)
        B, _, H, W = logits_BKHW.shape if logits_BKHW.dim() == 4 else (0, 0, 0, 0)
        if tuple(targets.shape) != (B, H, W) or targets.is_floating_point():
            raise TrainingError(
                f"targets {describe(targets)} stand against outputs of {tuple(logits_BKHW.shape)}: "
                "segmentation takes a class number for each pixel; choose a model with outputs B, K, H, W, "
                "say model=unet, or another task"
            )
        return F.cross_entropy(logits_BKHW, targets, ignore_index=self.IGNORED)

    def make_metrics(self) -> Mapping[str, Metric]:
        common: dict[str, Any] = {"ignore_index": self.IGNORED, "validate_args": False}
        return {
            "acc": MulticlassAccuracy(self.classes, average="micro", **common),
            "iou": MulticlassJaccardIndex(self.classes, average="macro", **common),
        }

    def predict(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        return get_logits(outputs), targets


class Regression(Task):
    """Tell K values, or a value for each pixel: outputs and targets of one shape.

    Args:
        metric: r2, the part of the variance that is explained, over all values together.
    """

    outputs = "values"

    def __init__(self, classes: int, metric: str = "r2") -> None:
        super().__init__(classes, metric)

    def compute_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        if targets.numel() != outputs.numel() or not targets.is_floating_point():
            raise TrainingError(
                f"targets {describe(targets)} stand against outputs of {tuple(outputs.shape)}: regression "
                "takes as many floating-point values; set task=classification for class numbers"
            )
        return F.mse_loss(outputs, targets.view_as(outputs))

    def make_metrics(self) -> Mapping[str, Metric]:
        return {"r2": R2Score()}

    def predict(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.float().flatten(), targets.float().flatten()


def get_logits(outputs: Any) -> Tensor:
    """Return the main output of a segmenter: torchvision's give a dict with `out` in it."""
    logits: Tensor = outputs["out"] if isinstance(outputs, Mapping) else outputs
    return logits


def compute_class_loss(outputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross entropy of classes, one a sample or a pixel.

    Raises:
        TrainingError: targets are no class numbers; it names the task that takes them.
    """
    logits = get_logits(outputs)
    check_class_numbers(targets, logits.shape)
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def check_class_numbers(targets: Tensor, shape: Sequence[int]) -> None:
    """Refuse targets that are no class numbers for outputs of a shape.

    Raises:
        TrainingError: always then; it names the task that takes them.
    """
    if targets.is_floating_point() or targets.dtype is torch.bool or targets.dim() != len(shape) - 1:
        raise TrainingError(
            f"targets {describe(targets)} are no class numbers for outputs of {tuple(shape)}: set "
            "task=multilabel for labels of which several can be there, task=regression for values, "
            "task=segmentation for a class a pixel"
        )


def describe(targets: Tensor) -> str:
    """Describe targets in an error."""
    return f"of {targets.dtype} {tuple(targets.shape)}".replace("torch.", "")
