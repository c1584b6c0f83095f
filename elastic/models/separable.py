"""Build a small network of depthwise and 1×1 convolutions for 32×32 images.

Blocks are those of Liu et al., A ConvNet for the 2020s, arXiv 2201.03545: depthwise convolution, a norm,
two 1×1 convolutions, a shortcut around them. Between the two stands a gated linear unit
(Dauphin et al., arXiv 1612.08083), for few weights that are used at many places.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from elastic.errors import OptionError
from elastic.ranges import Count

BLOCKS = (2, 4, 3)  # of each stage, at 32×32, 16×16 and 8×8
KERNEL = 5


class ChannelNorm(nn.LayerNorm):
    """Normalise the channels of each pixel."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)  # in the memory's order where that is channels_last
        y_BHWC = F.layer_norm(x_BHWC, self.normalized_shape, self.weight, self.bias, self.eps)
        return y_BHWC.permute(0, 3, 1, 2)


class SeparableBlock(nn.Module):
    """Look around in each channel, then mix channels: y = x + W₂ GLU(W₁ norm(depthwise(x)))."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2, groups=channels)
        self.norm = norm(channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = F.glu(self.expand(self.norm(self.depthwise(x_BCHW))), 1)
        y_BCHW: Tensor = x_BCHW + self.project(h_BCHW)
        return y_BCHW


NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": ChannelNorm, "batch": nn.BatchNorm2d}


def separable(
    width: Count = 16,
    norm: Literal["layer", "batch"] = "layer",
    in_channels: int = 3,
    classes: int = 10,
) -> nn.Sequential:
    """Build three stages at `width`, 2·`width` and 3·`width` channels, halving the image in between.

    Args:
        norm: layer norm over the channels of a pixel, which feels when channels come and go between blocks;
            or batch norm, which does not.

    Raises:
        OptionError: another norm.
    """
    if norm not in NORMS:
        raise OptionError(f"there is no norm '{norm}': choose {' or '.join(NORMS)}")
    make_norm, net = NORMS[norm], nn.Sequential()
    net.add_module("conv", nn.Conv2d(in_channels, width, 3, padding=1))
    net.add_module("norm", make_norm(width))
    for i, blocks in enumerate(BLOCKS, start=1):
        if i > 1:
            net.add_module(f"down{i}", nn.Conv2d((i - 1) * width, i * width, 2, stride=2))
            net.add_module(f"norm{i}", make_norm(i * width))
        net.add_module(
            f"stage{i}", nn.Sequential(*(SeparableBlock(i * width, make_norm) for _ in range(blocks)))
        )
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(len(BLOCKS) * width, classes))
    return net
