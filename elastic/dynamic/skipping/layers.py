"""Activate kernels, and pool active maps, by the compiled kernel or by stock torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.dynamic.activations import GRADED, Activation, find_active
from elastic.dynamic.maps import average_maps
from elastic.dynamic.modules import KernelActivation
from elastic.dynamic.skipping import compiling
from elastic.dynamic.skipping.active import Active, ActiveLayer, check_maps, check_size, list_all_channels
from elastic.dynamic.skipping.compiling import PoolShape
from elastic.dynamic.skipping.native import allocate, call, get_workspace, interrupt

HARD = 0  # gates are 0 or 1
GATES = {"ramp": 1, "scale": 2}  # as in the kernel


class ActiveModule(ActiveLayer):
    """Run a kernel activation module at inference: maps and the active ones among them → the kernels engaged.

    Args:
        reads_images: whether maps have two dimensions, as the kernel takes them, and channels come first.

    Its set of weights is looked up for each input, so that another one may be selected between requests.
    """

    def __init__(self, module: KernelActivation, reads_images: bool) -> None:
        super().__init__()
        self.module, self.reads_images = module, reads_images
        self.folded = [head.fold() for head in module.iterate_heads()]

    @property
    def is_compiled(self) -> bool:
        return self.reads_images and super().is_compiled

    def forward(self, x: Tensor, reads: Active | None = None) -> Active:
        axis = self.module.site.axis
        if not self.module.deterministic or self.module.site.together > 1:
            interrupt()  # what it draws is drawn anew each time, and what torch spreads is computed anew
            x = x if reads is None else reads.mask(x, axis)
            return Active.from_gates(self.module(x).flatten(1))
        head, activation = self.folded[self.module.active_set], self.module.activation
        if self.reads_images:
            return activate_kernels(x, reads, *head, activation)
        x = x if reads is None else reads.mask(x, axis)
        return _activate_by_means(average_maps(x, axis), *head, activation)


class ActiveMaxPool2d(ActiveLayer):
    """Pool the active maps; `ceil` lets the last windows reach beyond them."""

    def __init__(self, size: int, stride: int, padding: int = 0, ceil: bool = False) -> None:
        super().__init__()
        self.sizes = (size, stride, padding, ceil)

    def forward(self, x_BCHW: Tensor, reads: Active | None = None) -> Tensor:
        return max_pool(x_BCHW, reads, *self.sizes, zeros=self.zeros)


def activate_kernels(
    x_BCHW: Tensor,
    reads: Active | None,
    weight_KC: Tensor,
    bias_K: Tensor,
    within_2C: Tensor,
    activation: Activation,
) -> Active:
    """Activate the kernels that a module engages: a positive score each, or the highest one.

    The score is linear in the means of the active input maps, clamped between the least and the most of each.
    Gates are what `activation` makes of it, or 1.
    """
    kernels, channels = weight_KC.shape
    if compiling.load_kernel() is None:
        x_BCHW = x_BCHW if reads is None else reads.mask(x_BCHW)
        return _activate_by_means(average_maps(x_BCHW, 1), weight_KC, bias_K, within_2C, activation)
    x_BCHW = check_maps(x_BCHW, channels)
    batch, _, height, width = x_BCHW.shape
    active = Active(
        allocate(batch, kernels, dtype=torch.int32),
        allocate(batch, dtype=torch.int32),
        allocate(batch, kernels),
    )
    reads = reads or list_all_channels(batch, channels)
    call(
        *("engage", x_BCHW, batch, channels, height * width, reads.channel_BK, reads.count_B),
        *(weight_KC, bias_K, within_2C, kernels, GATES.get(activation, HARD), *active),
        *(get_workspace(batch * channels), torch.get_num_threads()),
    )
    return active


def _activate_by_means(
    mean_BC: Tensor, weight_KC: Tensor, bias_K: Tensor, within_2C: Tensor, activation: Activation
) -> Active:
    """Activate kernels by stock torch."""
    score_BK = F.linear(mean_BC.clamp(*within_2C), weight_KC, bias_K)
    return Active.from_gates(GRADED.get(activation, find_active)(score_BK))


def max_pool(
    x_BCHW: Tensor,
    reads: Active | None,
    size: int,
    stride: int,
    padding: int = 0,
    ceil: bool = False,
    *,
    zeros: bool,
) -> Tensor:
    """Pool the active channels; the others are zero, or anything."""
    if compiling.load_kernel() is None:
        y_BCHW = F.max_pool2d(x_BCHW, size, stride, padding, ceil_mode=ceil)
        return reads.mask(y_BCHW) if zeros and reads is not None else y_BCHW
    x_BCHW = check_maps(x_BCHW, x_BCHW.shape[1] if reads is None else reads.channel_BK.shape[1])
    batch, channels, height, width = x_BCHW.shape
    rows, columns = (_count_windows(side, size, stride, padding, ceil) for side in (height, width))
    check_size((height, width), "pool", (rows, columns))
    y_BCHW = allocate(batch, channels, rows, columns)
    channel_BK, count_B, _ = reads or list_all_channels(batch, channels)
    shape = PoolShape(channels, height, width, size, stride, padding, rows, columns)
    call("max_pool", shape, x_BCHW, y_BCHW, batch, channel_BK, count_B, zeros, torch.get_num_threads())
    return y_BCHW


def _count_windows(side: int, size: int, stride: int, padding: int, ceil: bool) -> int:
    """Count the windows along a side; the last one begins within it, or before."""
    beyond = stride - 1 if ceil else 0
    count = (side + 2 * padding - size + beyond) // stride + 1
    return count - 1 if ceil and (count - 1) * stride >= side + padding else count
