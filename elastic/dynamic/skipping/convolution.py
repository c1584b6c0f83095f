"""Convolve active channels only, by the compiled kernel or by stock torch."""

from functools import partial
from typing import Literal, NamedTuple, TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.dynamic.skipping import compiling, tiles
from elastic.dynamic.skipping.active import (
    Active,
    ActiveLayer,
    check_maps,
    check_size,
    copy_bias,
    list_all_channels,
)
from elastic.dynamic.skipping.blocks import SLACK, find_blocks
from elastic.dynamic.skipping.compiling import ConvolutionShape
from elastic.dynamic.skipping.gathering import gather_and_convolve
from elastic.dynamic.skipping.native import allocate, call, get_workspace, interrupt
from elastic.widths.operations.registry import find_base

Method = Literal["kernel", "stock", "dense"]
MAX_TAPS = 121  # as in the kernel


def list_methods() -> list[Method]:
    """List the methods that work on this machine, the default first: the kernel needs a C++ compiler."""
    methods: tuple[Method, ...] = get_args(Method)
    return [method for method in methods if method != "kernel" or compiling.load_kernel() is not None]


class _Plan(NamedTuple):
    """Hold what a convolution has for one size of its input."""

    shape: ConvolutionShape
    weight: Tensor  # as the kernel wants it
    packed: Tensor | None  # as it wants it for blocks
    out: tuple[int, int, int]
    work: int  # floats that it needs for each thread


class ActiveConv2d(ActiveLayer):
    """Convolve, and apply the ReLU behind it, reading and computing active channels only.

    Args:
        conv: its weights are copied; norms must have been folded in.
        relu: whether negative values become zero.
        method: "kernel", "stock" (gathers weights for one sample, masks for several) or "dense" (masks).

    Where all channels are active, the kernel leaves out blocks of the weight that are zero.

    `forward(x_BCHW, reads, writes, residual_BKHW)`: `reads` and `writes` are the active channels, None where
    all are. Active outputs are multiplied by their gates, then the residual is added to them, then comes the
    ReLU. A residual of another shape is added as torch would, and spreads or is spread.

    Raises:
        StructureError: inputs of another type, or of other channels, than its kernel takes.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool, zeros: bool = True, method: Method = "kernel") -> None:
        super().__init__()
        self.stride, self.padding = conv.stride[0], int(conv.padding[0])
        self.relu, self.zeros, self.method = relu, zeros, method
        weight = conv.weight.detach()
        padded = weight.new_zeros(weight.numel() + SLACK)
        padded[: weight.numel()] = weight.flatten()
        self.weight = padded[: weight.numel()].view(weight.shape)
        self.bias = copy_bias(conv, conv.out_channels)
        self.blocks = find_blocks(weight)
        self._weights: dict[int, tuple[Tensor, Tensor | None]] = {}  # that plans of one algorithm share
        self._plans: dict[tuple[int, int, bool], _Plan] = {}

    @staticmethod
    def takes(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Tell whether a layer is one that this can stand for."""
        return (
            find_base(type(conv)) is nn.Conv2d
            and isinstance(conv, nn.Conv2d)
            and conv.groups == 1
            and conv.padding_mode == "zeros"
            and not isinstance(conv.padding, str)
            and len(set(conv.stride)) == len(set(conv.padding)) == len(set(conv.dilation)) == 1
            and conv.dilation[0] == 1
            and conv.weight[0, 0].numel() <= MAX_TAPS
            and conv.weight.dtype == torch.float32
        )

    @property
    def is_compiled(self) -> bool:
        return self.method == "kernel" and super().is_compiled

    def forward(
        self,
        x_BCHW: Tensor,
        reads: Active | None = None,
        writes: Active | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        fits = residual is None or self._fits(residual, x_BCHW)
        if self.method == "kernel" and fits:
            return self._run_kernel(x_BCHW, reads, writes, residual, self.relu)
        y_BKHW = self._convolve(x_BCHW, reads, writes)
        if residual is not None:
            y_BKHW = y_BKHW.add_(residual) if fits else y_BKHW + residual
        y_BKHW = y_BKHW.relu_() if self.relu else y_BKHW
        return y_BKHW if writes is None or residual is None else writes.mask(y_BKHW)

    def _fits(self, residual: Tensor, x_BCHW: Tensor) -> bool:
        """Tell whether a residual has an entry for each of the result's, so that the kernel can add it."""
        shape = (len(x_BCHW), *self._measure(*x_BCHW.shape[-2:]))
        return residual.dtype == torch.float32 and residual.shape == shape

    def _measure(self, height: int, width: int) -> tuple[int, int, int]:
        """Measure the result of one size of input: channels, rows, columns."""
        kernels, _, *kernel = self.weight.shape
        rows, columns = (
            (size + 2 * self.padding - taps) // self.stride + 1
            for size, taps in zip((height, width), kernel, strict=True)
        )
        check_size((height, width), "kernel", (rows, columns))
        return kernels, rows, columns

    def _convolve(self, x_BCHW: Tensor, reads: Active | None, writes: Active | None) -> Tensor:
        """Convolve without residual and ReLU."""
        if self.method == "kernel":
            interrupt()
            return self._run_kernel(x_BCHW, reads, writes, None, relu=False)
        if self.method == "stock" and len(x_BCHW) == 1 and (reads or writes):
            convolve = partial(F.conv2d, stride=self.stride, padding=self.padding)
            return gather_and_convolve(convolve, self.weight, self.bias, x_BCHW, reads, writes)
        x_BCHW = x_BCHW if reads is None else reads.mask(x_BCHW)
        y_BKHW = F.conv2d(x_BCHW, self.weight, self.bias, self.stride, self.padding)
        return y_BKHW if writes is None else writes.scale(y_BKHW)

    def _run_kernel(
        self,
        x_BCHW: Tensor,
        reads: Active | None,
        writes: Active | None,
        residual: Tensor | None,
        relu: bool,
    ) -> Tensor:
        x_BCHW = check_maps(x_BCHW, self.weight.shape[1])
        batch, _, height, width = x_BCHW.shape
        size = (height, width, batch == 1 and reads is not None)
        plan = self._plans.get(size) or self._plan(*size)
        y_BKHW = allocate(batch, *plan.out)
        residual = None if residual is None else residual.contiguous()
        inputs = reads or list_all_channels(batch, self.weight.shape[1])
        outputs = writes or list_all_channels(batch, self.weight.shape[0])
        threads = torch.get_num_threads()
        maps = (self.bias, x_BCHW, residual, y_BKHW, batch, inputs.channel_BK, inputs.count_B)
        work = get_workspace(threads * plan.work), threads
        if self.blocks is None or reads or writes:
            call("convolution", plan.shape, plan.weight, *maps, *outputs, relu, self.zeros, *work)
        else:
            blocks = self.blocks.table, outputs.gate_BK
            call("convolve_blocks", plan.shape, plan.packed, *maps, *blocks, relu, *work)
        return y_BKHW

    def _plan(self, height: int, width: int, once: bool = False) -> _Plan:
        """Plan how the kernel convolves inputs of one size, and keep the plan for the next."""
        kernel, out = compiling.load_kernel(), self._measure(height, width)
        assert kernel is not None
        (kernels, rows, columns), (_, channels, *taps) = out, self.weight.shape
        takes_tiles = taps == [3, 3] and self.stride == 1
        algorithm = tiles.PIXELS
        if takes_tiles:
            algorithm = tiles.choose_algorithm(channels, kernels, rows, columns, once)
        sizes = (channels, height, width, kernels, *taps, self.stride, self.padding, rows, columns, algorithm)
        shape = ConvolutionShape(*sizes)
        if algorithm not in self._weights:
            self._weights[algorithm] = self._transform_weights(algorithm)
        plan = _Plan(shape, *self._weights[algorithm], out, kernel.count_work(shape))
        self._plans[height, width, once] = plan
        return plan

    def _transform_weights(self, algorithm: int) -> tuple[Tensor, Tensor | None]:
        packed = None if self.blocks is None else self.blocks.pack(self.weight)
        return (
            tiles.transform_weight(self.weight, algorithm),
            None if packed is None else tiles.transform_weight(packed, algorithm),
        )
