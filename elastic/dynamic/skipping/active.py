"""Layers of which only the active channels are computed and read, by a small compiled kernel or stock torch.

Stock torch has to gather the weights of the active channels for each input, which costs as much as it saves
where few pixels use them. The kernel (`kernel/`) is told the channels' numbers and walks tensors where they
are; where it cannot be compiled, stock torch is used. All of it is for inference, in fp32 on the CPU.
"""

import ctypes
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.dynamic.modules import GRADED, Choice, find_active
from elastic.dynamic.skipping.native import call, compiled, interrupt, work
from elastic.errors import StructureError

MOST_TAPS = 121
TRANSFORMS = 25  # products that a tile's transform for one channel takes as long as, about


class Active(NamedTuple):
    """The active channels of each sample: `channel_BK[b, :count_B[b]]`, ascending, both int32.

    gate_BK is what their maps have been multiplied by, and 0 where a channel is not active.
    """

    channel_BK: Tensor
    count_B: Tensor
    gate_BK: Tensor

    def shut(self, x_BCHW: Tensor) -> Tensor:
        """Zero where a map is not active, whatever it holds there."""
        return torch.where(self.gate_BK[:, :, None, None] != 0, x_BCHW, 0.0)

    def scale(self, x_BCHW: Tensor) -> Tensor:
        """Maps times their gates; zero where a map is not active, whatever it holds there."""
        return self.shut(x_BCHW) * self.gate_BK[:, :, None, None]

    @staticmethod
    def of(gate_BK: Tensor) -> "Active":
        """The channels whose gates are not 0."""
        off_BK = gate_BK == 0
        channel_BK = torch.argsort(off_BK, dim=1, stable=True).int()
        return Active(channel_BK, (~off_BK).sum(1).int(), gate_BK)


@functools.lru_cache(maxsize=64)
def list_all_channels(batch: int, channels: int) -> Active:
    """All channels of all samples."""
    channel_BK = torch.arange(channels, dtype=torch.int32).repeat(batch, 1)
    count_B = torch.full((batch,), channels, dtype=torch.int32)
    return Active(channel_BK, count_B, torch.ones(batch, channels))


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            *("channels", "height", "width", "kernels", "kernel_height", "kernel_width"),
            *("stride", "pad", "out_height", "out_width", "tiled"),
        )
    ]


class _Size(NamedTuple):
    """What a convolution has for one size of its input."""

    shape: _Shape
    weight: Tensor  # as the kernel wants it
    out: tuple[int, int, int]
    work: int  # floats that it needs for each thread


class ActiveConv2d(nn.Module):
    """A convolution, and the ReLU behind it, that reads and computes active channels only.

    Args:
        conv: its weights are copied; norms must have been folded in.
        relu: whether negative values become zero.
        zeros: whether outputs that are not active are to be zero; else they are anything.
        way: "kernel", "stock" (gathers weights for one sample, masks for several) or "dense" (masks).

    `forward(x_BCHW, reads, writes, residual_BKHW)`: `reads` and `writes` are the active channels, None where
    all are. Active outputs are multiplied by their gates, then the residual is added to them, then comes the
    ReLU. A residual of another shape is added as torch would, and spreads or is spread.

    Raises:
        StructureError: inputs of another type, or of other channels, than its kernel takes.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool, zeros: bool, way: str = "kernel") -> None:
        super().__init__()
        self.stride, self.padding = conv.stride[0], int(conv.padding[0])
        self.relu, self.zeros, self.way = relu, zeros, way
        weight = conv.weight.detach()
        slack = torch.zeros(weight.numel() + 64)  # vectors may be read beyond the last kernel
        slack[: weight.numel()] = weight.flatten()
        bias = torch.zeros(len(weight)) if conv.bias is None else conv.bias.detach().clone()
        self._sizes: dict[tuple[int, int], _Size] = {}
        self.weight, self.bias = slack[: weight.numel()].view(weight.shape), bias

    @staticmethod
    def takes(conv: nn.Module) -> bool:
        """Whether a layer is one that this can stand for."""
        return (
            type(conv) is nn.Conv2d
            and conv.groups == 1
            and conv.padding_mode == "zeros"
            and not isinstance(conv.padding, str)
            and len(set(conv.stride)) == len(set(conv.padding)) == len(set(conv.dilation)) == 1
            and conv.dilation[0] == 1
            and conv.weight[0, 0].numel() <= MOST_TAPS
            and conv.weight.dtype == torch.float32
        )

    def forward(
        self,
        x_BCHW: Tensor,
        reads: Active | None = None,
        writes: Active | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        alike = residual is None or (
            residual.dtype == torch.float32
            and residual.shape == (len(x_BCHW), *self._out(*x_BCHW.shape[-2:]))
        )
        if self.way == "kernel" and alike:
            return self._kernel(x_BCHW, reads, writes, residual, self.relu)
        y_BKHW = self._convolved(x_BCHW, reads, writes)
        if residual is not None:
            y_BKHW = y_BKHW.add_(residual) if alike else y_BKHW + residual
        y_BKHW = y_BKHW.relu_() if self.relu else y_BKHW
        return y_BKHW if writes is None or residual is None else writes.shut(y_BKHW)

    def _out(self, height: int, width: int) -> tuple[int, int, int]:
        kernels, _, *kernel = self.weight.shape
        high, wide = (
            (x + 2 * self.padding - k) // self.stride + 1
            for x, k in zip((height, width), kernel, strict=True)
        )
        _fits(high, wide, "kernel", height, width)
        return kernels, high, wide

    def _convolved(self, x_BCHW: Tensor, reads: Active | None, writes: Active | None) -> Tensor:
        if self.way == "kernel":
            interrupt()
            return self._kernel(x_BCHW, reads, writes, None, relu=False)
        if self.way == "stock" and len(x_BCHW) == 1 and (reads or writes):
            return self._gathered(x_BCHW, reads, writes)
        x_BCHW = x_BCHW if reads is None else reads.shut(x_BCHW)
        y_BKHW = F.conv2d(x_BCHW, self.weight, self.bias, self.stride, self.padding)
        return y_BKHW if writes is None else writes.scale(y_BKHW)

    def _gathered(self, x_1CHW: Tensor, reads: Active | None, writes: Active | None) -> Tensor:
        weight, bias = self.weight, self.bias
        if writes is not None:
            kernels = writes.channel_BK[0, : writes.count_B[0]]
            weight, bias = weight.index_select(0, kernels), bias.index_select(0, kernels)
        if reads is not None:
            channels = reads.channel_BK[0, : reads.count_B[0]]
            weight, x_1CHW = weight.index_select(1, channels), x_1CHW.index_select(1, channels)
        y_1KHW = F.conv2d(x_1CHW, weight, bias, self.stride, self.padding)
        if writes is None:
            return y_1KHW
        whole_1KHW = y_1KHW.new_zeros(1, len(self.weight), *y_1KHW.shape[2:])
        gated_1KHW = y_1KHW * writes.gate_BK[:, kernels, None, None]
        return whole_1KHW.index_copy_(1, kernels.long(), gated_1KHW)

    def _kernel(
        self,
        x_BCHW: Tensor,
        reads: Active | None,
        writes: Active | None,
        residual: Tensor | None,
        relu: bool,
    ) -> Tensor:
        x_BCHW = _checked(x_BCHW, self.weight.shape[1])
        batch, _, height, width = x_BCHW.shape
        size = self._sizes.get((height, width)) or self._measure(height, width)
        y_BKHW = torch.empty(batch, *size.out)
        residual = None if residual is None else residual.contiguous()
        inputs = reads or list_all_channels(batch, self.weight.shape[1])
        outputs = writes or list_all_channels(batch, self.weight.shape[0])
        threads = torch.get_num_threads()
        call(
            *("convolution", size.shape, size.weight, self.bias, x_BCHW, residual, y_BKHW, batch),
            *(inputs.channel_BK, inputs.count_B, *outputs, relu, self.zeros),
            *(work(threads * size.work), threads),
        )
        return y_BKHW

    def _measure(self, height: int, width: int) -> "_Size":
        library, (_, channels, *kernel), out = compiled(), self.weight.shape, self._out(height, width)
        assert library is not None
        kernels, high, wide = out
        tiled = kernel == [3, 3] and self.stride == 1 and tiles_pay(channels, kernels, high, wide)
        weight = of_tiles(self.weight) if tiled else self.weight
        shape = _Shape(
            channels, height, width, kernels, *kernel, self.stride, self.padding, high, wide, tiled
        )
        found = _Size(shape, weight, out, library.active_work(ctypes.byref(shape)))
        self._sizes[height, width] = found
        return found


def _checked(x_BCHW: Tensor, channels: int) -> Tensor:
    """The maps as the kernel wants them, which would read whatever is there."""
    if x_BCHW.dtype != torch.float32 or x_BCHW.device.type != "cpu":
        raise StructureError(
            f"kernels are skipped for fp32 inputs on the CPU, not {x_BCHW.dtype} on {x_BCHW.device}"
        )
    if x_BCHW.dim() != 4 or x_BCHW.shape[1] != channels:
        raise StructureError(
            f"a layer reads {channels} channels of batches of images, not a tensor of {tuple(x_BCHW.shape)}"
        )
    return x_BCHW.contiguous()


def _fits(high: int, wide: int, what: str, height: int, width: int) -> None:
    if min(high, wide) < 1:
        raise StructureError(f"maps of {height}×{width} are too small for a {what}: give larger images")


def tiles_pay(channels: int, kernels: int, height: int, width: int) -> bool:
    """Whether a map of so many pixels takes fewer vectors of products by tiles, and of their transforms."""
    products, tiles = channels * kernels, math.ceil(height / 2) * math.ceil(width / 2)
    by_pixels = 9 * math.ceil(height * width / 16) * products
    return tiles * (products + TRANSFORMS * (channels + kernels)) < by_pixels


def of_tiles(weight_KC33: Tensor) -> Tensor:
    """G g Gᵀ of each kernel, of Winograd's F(2×2, 3×3): Lavin & Gray, arXiv 1509.09308, section 4.1."""
    g_43 = torch.tensor([[2.0, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2
    return (g_43 @ weight_KC33 @ g_43.T).contiguous()


GATES = {choice: i for i, choice in enumerate(GRADED, start=1)}  # as in the kernel; 0: gates are 0 or 1


def activate_kernels(
    x_BCHW: Tensor,
    reads: Active | None,
    weight_KC: Tensor,
    bias_K: Tensor,
    within_2C: Tensor,
    choice: Choice = "soft",
) -> Active:
    """The kernels that a kernel activation module engages: a positive score each, or the highest one.

    The score is linear in the means of the active input maps, held within the least and the most of each.
    Gates are what `choice` makes of it, or 1.
    """
    kernels, channels = weight_KC.shape
    if compiled() is None:
        x_BCHW = x_BCHW if reads is None else reads.shut(x_BCHW)
        mean_BC = x_BCHW.mean((2, 3)).clamp(*within_2C)
        return Active.of(GRADED.get(choice, find_active)(F.linear(mean_BC, weight_KC, bias_K)))
    x_BCHW = _checked(x_BCHW, channels)
    batch, _, *size = x_BCHW.shape
    found = Active(
        torch.empty(batch, kernels, dtype=torch.int32),
        torch.empty(batch, dtype=torch.int32),
        torch.empty(batch, kernels),
    )
    reads = reads or list_all_channels(batch, channels)
    call(
        *("engage", x_BCHW, batch, channels, size[0] * size[1], reads.channel_BK, reads.count_B),
        *(weight_KC, bias_K, within_2C, kernels, GATES.get(choice, 0), *found),
        *(work(batch * channels), torch.get_num_threads()),
    )
    return found


def max_pool(x_BCHW: Tensor, reads: Active, size: int, stride: int, zeros: bool) -> Tensor:
    """Max pooling, without padding, of the active channels; the others are zero, or anything."""
    if compiled() is None:
        y_BCHW = F.max_pool2d(x_BCHW, size, stride)
        return reads.shut(y_BCHW) if zeros else y_BCHW
    x_BCHW = _checked(x_BCHW, reads.channel_BK.shape[1])
    batch, channels, height, width = x_BCHW.shape
    out = ((height - size) // stride + 1, (width - size) // stride + 1)
    _fits(*out, "pool", height, width)
    y_BCHW = torch.empty(batch, channels, *out)
    lists = (reads.channel_BK, reads.count_B)
    sizes = (batch, channels, height, width, size, stride, *out)
    call("max_pool", x_BCHW, y_BCHW, *sizes, *lists, zeros, torch.get_num_threads())
    return y_BCHW
