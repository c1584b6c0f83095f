"""Run the test split image by image: what a network with kernel activation modules does with each."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from elastic.data import ImageData
from elastic.data.images import scale_bytes
from elastic.dynamic.loss import ActivationCost
from elastic.dynamic.modules import iterate_modules

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PerImage:
    """Hold what each image took, and how often each kernel was on.

    Attributes:
        correct_N: whether the image was classified right.
        macs_N: what it took, modules included.
        label_N: its class.
        usage: by convolution, the part of the images for which each kernel was on.
    """

    correct_N: Tensor
    macs_N: Tensor
    label_N: Tensor
    usage: dict[str, Tensor]

    @property
    def accuracy(self) -> float:
        """Average over the images."""
        return float(self.correct_N.double().mean())

    @property
    def macs(self) -> float:
        """Average over the images."""
        return float(self.macs_N.double().mean())


@torch.inference_mode()
def run_per_image(net: fx.GraphModule, data: ImageData) -> PerImage:
    """Run the test split, in fp32, through a network with modules."""
    net.eval()
    cost = ActivationCost(net, torch.zeros(1, *data.shape))
    modules = {module.site.writer: module for module in iterate_modules(net)}
    counts = {name: torch.zeros(module.active_BK.shape[1]) for name, module in modules.items()}
    correct, macs, labels = [], [], []
    for x_BCHW, y_B in read_test_batches(data):
        correct.append(net(x_BCHW).argmax(1) == y_B)
        macs.append(cost.macs_B())
        labels.append(y_B)
        for name, module in modules.items():
            counts[name] += module.active_BK.sum(0)
    images = sum(map(len, labels))
    usage = {name: count_K / images for name, count_K in counts.items()}
    return PerImage(torch.cat(correct), torch.cat(macs), torch.cat(labels), usage)


def read_test_batches(data: ImageData) -> list[Batch]:
    """Read the test split as networks take it."""
    data.prepare_data()
    data.setup("test")
    return [(data.normalise(scale_bytes(x_BCHW)), y_B) for x_BCHW, y_B in data.test_dataloader()]


def sample_images(data: ImageData, count: int) -> Tensor:
    """Draw images of the test split, always the same ones, as networks take them."""
    images_NCHW = torch.cat([x_BCHW for x_BCHW, _ in read_test_batches(data)])
    order_N = torch.randperm(len(images_NCHW), generator=torch.Generator().manual_seed(0))
    return images_NCHW[order_N[:count]]
