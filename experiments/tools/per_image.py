"""What a network with kernel activation modules does with each image of the test split."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from elastic.data import ImageData
from elastic.data.images import to_unit
from elastic.dynamic.loss import ActivationCost
from elastic.dynamic.modules import iterate_modules


@dataclass(frozen=True)
class PerImage:
    """Of each image: whether it was classified right, and its MACs. Of each layer's kernels: how often on."""

    right_N: Tensor
    macs_N: Tensor
    label_N: Tensor
    duty: dict[str, Tensor]

    @property
    def accuracy(self) -> float:
        return float(self.right_N.double().mean())

    @property
    def macs(self) -> float:
        return float(self.macs_N.double().mean())


@torch.inference_mode()
def run_per_image(net: fx.GraphModule, data: ImageData) -> PerImage:
    """Run the test split, in fp32, through a network with modules."""
    net.eval()
    engaged = ActivationCost(net, torch.zeros(1, *data.shape))
    right, macs, labels = [], [], []
    duty = {module.site.writer: torch.zeros(module.active_BK.shape[1]) for module in iterate_modules(net)}
    for x_BCHW, y_B in batches(data):
        right.append(net(x_BCHW).argmax(1) == y_B)
        macs.append(engaged.macs_B())
        labels.append(y_B)
        for module in iterate_modules(net):
            duty[module.site.writer] += module.active_BK.sum(0)
    count = sum(map(len, labels))
    shares = {name: on_K / count for name, on_K in duty.items()}
    return PerImage(torch.cat(right), torch.cat(macs), torch.cat(labels), shares)


def batches(data: ImageData) -> list[tuple[Tensor, Tensor]]:
    """The test split as networks take it."""
    data.prepare_data()
    data.setup("test")
    return [(data.normalise(to_unit(x)), y) for x, y in data.test_dataloader()]
