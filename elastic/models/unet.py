"""Build a U-Net for small images: Ronneberger et al., arXiv 1505.04597, with padding and norms."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.errors import OptionError


class UNet(nn.Module):
    """Halve the image `depth` times and double it again, each time beside what was seen on the way down."""

    def __init__(self, width: int, depth: int, in_channels: int, classes: int) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(make_block(*pair) for pair in pairwise([in_channels, *channels]))
        self.up = nn.ModuleList(make_block(deep + shallow, shallow) for shallow, deep in pairwise(channels))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps: list[Tensor] = []
        for block in self.down:
            x_BCHW = block(F.max_pool2d(x_BCHW, 2) if maps else x_BCHW)
            maps.append(x_BCHW)
        for block, shallow_BCHW in zip(reversed(self.up), reversed(maps[:-1]), strict=True):
            enlarged_BCHW = F.interpolate(x_BCHW, size=shallow_BCHW.shape[2:])
            x_BCHW = block(torch.cat([enlarged_BCHW, shallow_BCHW], 1))
        logits_BKHW: Tensor = self.head(x_BCHW)
        return logits_BKHW


def make_block(inputs: int, outputs: int) -> nn.Sequential:
    """Make a 3×3 convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def unet(width: int = 8, depth: int = 2, in_channels: int = 3, classes: int = 2) -> UNet:
    """Build a U-Net: outputs B, K, H, W, of the image's own height and width.

    Args:
        width: channels at full size, doubled at each halving.
        depth: halvings.

    Raises:
        OptionError: a width or depth below 1.
    """
    if width < 1 or depth < 1:
        raise OptionError(f"a U-Net has a width and a depth of 1 or more, not {width} and {depth}")
    return UNet(width, depth, in_channels, classes)
