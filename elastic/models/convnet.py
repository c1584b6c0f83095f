"""Build a small plain CNN for small images (8×8 to 32×32)."""

from collections.abc import Sequence

from torch import nn

from elastic.errors import OptionError
from elastic.ranges import Count, Natural


def convnet(
    channels: Sequence[Count] = (8, 16, 16, 24),
    pools: Sequence[Natural] = (1, 3),
    in_channels: int = 1,
    classes: int = 10,
) -> nn.Sequential:
    """Build 3×3 convolutions with batch norm and ReLU, max- and global average pooling, one linear layer.

    Args:
        channels: of each convolution.
        pools: the convolutions (0-based) that a pooling follows.

    Raises:
        OptionError: there is no convolution, or one without a channel.
    """
    if not channels or min(channels) < 1:
        raise OptionError(
            f"channels is {list(channels)}: give at least one convolution of one channel or more"
        )
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip((in_channels, *channels), channels, strict=False)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i in pools else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))
