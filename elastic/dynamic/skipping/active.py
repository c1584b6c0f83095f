"""List the active channels of maps, for layers that compute and read no others.

Stock torch has to gather the weights of the active channels for each input, which costs as much as it saves
where few pixels use them. The kernel (`kernel/`) is told the channels' numbers and walks tensors where they
are; where it cannot be compiled, stock torch is used. All of it is for inference, in fp32 on the CPU.
"""

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from elastic.dynamic.maps import spread_over_maps
from elastic.dynamic.skipping import compiling
from elastic.dynamic.skipping.native import make_floats
from elastic.errors import StructureError


class Active(NamedTuple):
    """List the active channels of each sample: `channel_BK[b, :count_B[b]]`, ascending, both int32.

    gate_BK is what their maps have been multiplied by, and 0 where a channel is not active.
    """

    channel_BK: Tensor
    count_B: Tensor
    gate_BK: Tensor

    def mask(self, x: Tensor, axis: int = 1) -> Tensor:
        """Put zeros where a map is not active, whatever it holds there."""
        return torch.where(spread_over_maps(self.gate_BK, x, axis) != 0, x, 0.0)

    def scale(self, x: Tensor, axis: int = 1) -> Tensor:
        """Multiply maps by their gates; zeros where a map is not active, whatever it holds there."""
        return self.mask(x, axis) * spread_over_maps(self.gate_BK, x, axis)

    @staticmethod
    def from_gates(gate_BK: Tensor) -> "Active":
        """List the channels whose gates are not 0."""
        off_BK = gate_BK == 0
        channel_BK = torch.argsort(off_BK, dim=1, stable=True).int()
        return Active(channel_BK, (~off_BK).sum(1).int(), gate_BK)


class ActiveLayer(nn.Module):
    """Carry out a layer on the active channels of what it reads, its first argument; they are its second.

    Attributes:
        zeros: whether what is not active of its result has to be zero; else it is anything.
    """

    zeros = True

    @property
    def is_compiled(self) -> bool:
        """Tell whether the layer is a call of the kernel, and nothing else."""
        return compiling.load_kernel() is not None

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """Refuse values from outside, as weights are copies that no state has.

        Raises:
            StructureError: always.
        """
        raise StructureError(
            "a network that skips has copies of weights: load weights into the network that it is made of, "
            "and make it anew"
        )


def copy_bias(layer: nn.Module, kernels: int) -> Tensor:
    """Copy a layer's bias, which is zeros where it has none."""
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    return weight.new_zeros(kernels) if bias is None else bias.detach().clone()


@functools.lru_cache(maxsize=64)
def list_all_channels(batch: int, channels: int) -> Active:
    """List all channels of all samples."""
    channel_BK = torch.arange(channels, dtype=torch.int32, device="cpu").repeat(batch, 1)
    count_B = torch.full((batch,), channels, dtype=torch.int32, device="cpu")
    return Active(channel_BK, count_B, make_floats(batch, channels).fill_(1.0))


def check_maps(x_BCHW: Tensor, channels: int) -> Tensor:
    """Give maps as the kernel wants them, which would read whatever is there.

    Raises:
        StructureError: they are of another type, or have other channels.
    """
    if x_BCHW.dtype != torch.float32 or x_BCHW.device.type != "cpu":
        raise StructureError(
            f"kernels are skipped for fp32 inputs on the CPU, not {x_BCHW.dtype} on {x_BCHW.device}: "
            "convert them"
        )
    if x_BCHW.dim() != 4 or x_BCHW.shape[1] != channels:
        raise StructureError(
            f"a layer reads {channels} channels of batches of images, not a tensor of {tuple(x_BCHW.shape)}"
        )
    return x_BCHW.contiguous()


def check_size(size: tuple[int, int], layer: str, out: tuple[int, int]) -> None:
    """Refuse maps so small that a layer has no result.

    Raises:
        StructureError: they are.
    """
    if min(out) < 1:
        height, width = size
        raise StructureError(f"maps of {height}×{width} are too small for a {layer}: give larger images")
