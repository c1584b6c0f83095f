"""Convolve active channels by stock torch, whose weights are gathered for each sample."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.dynamic.calls import is_convolution
from elastic.dynamic.maps import spread_over_maps
from elastic.dynamic.skipping.active import Active, ActiveLayer, copy_bias

Convolve = Callable[[Tensor, Tensor, Tensor], Tensor]  # of maps, weight and bias

FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d), (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class GatheringConv(ActiveLayer):
    """Convolve in any number of dimensions, also transposed, reading and computing active channels only.

    Args:
        conv: its weights are copied; norms must have been folded in.
    """

    is_compiled = False

    def __init__(self, conv: nn.modules.conv._ConvNd) -> None:
        super().__init__()
        options: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        if conv.transposed:
            options["output_padding"] = conv.output_padding
        self.convolve = partial(FUNCTIONS[conv.transposed][len(conv.stride) - 1], **options)
        self.out_dim = 1 if conv.transposed else 0
        self.weight, self.bias = conv.weight.detach().clone(), copy_bias(conv, conv.out_channels)

    @staticmethod
    def takes(conv: nn.Module) -> TypeGuard[nn.modules.conv._ConvNd]:
        """Tell whether a layer is one that this can stand for."""
        return is_convolution(conv) and conv.groups == 1 and conv.padding_mode == "zeros"

    def forward(self, x: Tensor, reads: Active | None = None, writes: Active | None = None) -> Tensor:
        samples = zip(x.split(1), _split(reads, len(x)), _split(writes, len(x)), strict=True)
        own = self.convolve, self.weight, self.bias
        return torch.cat([gather_and_convolve(*own, *sample, out_dim=self.out_dim) for sample in samples])


def gather_and_convolve(
    convolve: Convolve,
    weight: Tensor,
    bias: Tensor,
    x_1C: Tensor,
    reads: Active | None,
    writes: Active | None,
    out_dim: int = 0,
) -> Tensor:
    """Convolve one sample with the weights of its active channels; kernels that are off give zeros.

    Args:
        out_dim: the dimension of the weight that kernels lie on; the other is that of what is read.
    """
    kernels = weight.shape[out_dim]
    if writes is not None:
        active = writes.channel_BK[0, : writes.count_B[0]]
        weight, bias = weight.index_select(out_dim, active), bias.index_select(0, active)
    if reads is not None:
        channels = reads.channel_BK[0, : reads.count_B[0]]
        weight, x_1C = weight.index_select(1 - out_dim, channels), x_1C.index_select(1, channels)
    y_1A = convolve(x_1C, weight, bias)
    if writes is None:
        return y_1A
    gated_1A = y_1A * spread_over_maps(writes.gate_BK[:, active], y_1A, 1)
    return y_1A.new_zeros(1, kernels, *y_1A.shape[2:]).index_copy_(1, active.long(), gated_1A)


def _split(active: Active | None, samples: int) -> list[Active | None]:
    if active is None:
        return [None] * samples
    return [Active(*parts) for parts in zip(*(x.split(1) for x in active), strict=True)]
