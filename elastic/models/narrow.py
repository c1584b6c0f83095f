"""Build any model with a fraction of its channels."""

from typing import Protocol

import torch
from torch import nn

from elastic.levels.sizes import level_sizes, make_resized
from elastic.ranges import Count, Fraction
from elastic.widths.discovery import discover


class Builder(Protocol):
    """Build a model for images of so many colours, and so many classes."""

    def __call__(self, *, in_channels: int, classes: int) -> nn.Module: ...


def narrow(
    model: Builder, fraction: Fraction, pixels: Count, in_channels: int = 3, classes: int = 10
) -> nn.Module:
    """Build a fresh model whose widths have a fraction of their channels, as a level of another has.

    It is what a level is compared with when it is trained alone. Its layers start as torch has them start.

    Args:
        pixels: height and width of its images.

    Raises:
        OptionError: there is no such fraction.
        StructureError: the fraction leaves a width without a channel.
    """
    net = model(in_channels=in_channels, classes=classes)
    example = torch.zeros(1, in_channels, pixels, pixels)
    widths = discover(net, example)
    (sizes,) = level_sizes(net, widths, example, [fraction])
    net = make_resized(net, widths, sizes)
    for reset in (getattr(layer, "reset_parameters", None) for layer in net.modules()):
        if reset is not None:
            reset()
    return net
