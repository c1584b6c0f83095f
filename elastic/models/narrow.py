"""Any model with a fraction of its channels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from elastic.levels.sizes import level_sizes, make_resized
from elastic.widths.discovery import discover


def narrow(
    model: Callable[..., nn.Module], fraction: float, pixels: int, in_channels: int = 3, classes: int = 10
) -> nn.Module:
    """A fresh model whose widths have a fraction of their channels, as a level of another has.

    It is what a level is compared with when it is trained alone. Its layers start as torch has them start.

    Args:
        model: called with in_channels and classes.
        pixels: height and width of its images.

    Raises:
        StructureError: no such fraction, or one that leaves a width without a channel.
    """
    net, example = (
        model(in_channels=in_channels, classes=classes),
        torch.zeros(1, in_channels, pixels, pixels),
    )
    widths = discover(net, example)
    (sizes,) = level_sizes(net, widths, example, [fraction])
    net = make_resized(net, widths, sizes)
    layers: Any = net.modules()
    for layer in layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return net
