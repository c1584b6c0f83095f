"""Lay out images, and the weights that work on them, in memory; all other tensors stay as they are."""

from typing import Any

import torch
from torch import Tensor, nn


def lay_out_weights(net: nn.Module, memory_format: torch.memory_format) -> None:
    """Bring the weights of convolutions over images into a memory format, in place.

    `net.to(memory_format=…)` refuses tensors of five dimensions, and changes the strides of whatever else
    has four, which need not stand for an image.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stub lacks it


def lay_out_images(x: Any, memory_format: torch.memory_format) -> Any:
    """Give images in a memory format, and anything else as it is."""
    is_batch = isinstance(x, Tensor) and x.dim() == 4
    return x.contiguous(memory_format=memory_format) if is_batch else x
