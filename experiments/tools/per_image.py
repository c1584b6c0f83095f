"""Run the test split image by image: what a network with kernel activation modules does with each."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from elastic.data import ImageData
from elastic.data.images import scale_bytes
from elastic.dynamic.loss import ActivationCost
from elastic.dynamic.modules import iterate_modules
from elastic.experiments.tools.metrics import TEST
from elastic.training.tasks import Classification, Task

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PerImage:
    """Hold what each image took, and how often each kernel was on.

    Attributes:
        metrics: over all images, `test/<metric>` of each metric of the task.
        macs_N: what each image took, modules included.
        label_N: its class; empty where a task has none.
        correct_N: whether it was classified right; likewise.
        usage: by convolution, the part of the images for which each kernel was on.
    """

    metrics: dict[str, float]
    macs_N: Tensor
    label_N: Tensor
    correct_N: Tensor
    usage: dict[str, Tensor]

    @property
    def macs(self) -> float:
        """Average over the images."""
        return float(self.macs_N.double().mean())


@torch.inference_mode()
def run_per_image(net: fx.GraphModule, data: ImageData, task: Task) -> PerImage:
    """Run the test split, in fp32, through a network with modules."""
    net.eval()
    cost = ActivationCost(net, torch.zeros(1, *data.shape))
    modules = {module.site.writer: module for module in iterate_modules(net)}
    counts = {name: torch.zeros(module.active_BK.shape[1]) for name, module in modules.items()}
    metrics = task.make_metrics()
    macs, labels, correct = [], [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.bool)]
    for x_BCHW, targets in read_test_batches(data):
        outputs = net(x_BCHW)
        for metric in metrics.values():
            metric.update(*task.predict(outputs, targets))
        if isinstance(task, Classification):
            labels.append(targets)
            correct.append(outputs.argmax(1) == targets)
        macs.append(cost.macs_B())
        for name, module in modules.items():
            counts[name] += module.active_BK.sum(0)
    macs_N = torch.cat(macs)
    usage = {name: count_K / len(macs_N) for name, count_K in counts.items()}
    measured = {f"{TEST}{name}": float(metrics[name].compute()) for name in task.list_metrics()}
    return PerImage(measured, macs_N, torch.cat(labels), torch.cat(correct), usage)


def read_test_batches(data: ImageData) -> list[Batch]:
    """Read the test split as networks take it, on the CPU."""
    data.prepare_data()
    data.setup("test")
    # A run on a GPU that has just ended still holds its images there.
    batches = ((x_BCHW.cpu(), y_B.cpu()) for x_BCHW, y_B in data.test_dataloader())
    return [(data.normalise(scale_bytes(x_BCHW)), y_B) for x_BCHW, y_B in batches]


def sample_images(data: ImageData, count: int) -> Tensor:
    """Draw images of the test split, always the same ones, as networks take them."""
    images_NCHW = torch.cat([x_BCHW for x_BCHW, _ in read_test_batches(data)])
    order_N = torch.randperm(len(images_NCHW), generator=torch.Generator().manual_seed(0))
    return images_NCHW[order_N[:count]]
