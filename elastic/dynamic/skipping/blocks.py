"""Leave out the kernels that gates have set to zero, a block of outputs at a time.

Outputs that read the same inputs are convolved together, from those inputs alone; the compiled kernel is told
which, as it is told what a module engages. Where gates close in blocks there are few such sets of outputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from elastic.dynamic.skipping.active import Active
from elastic.dynamic.skipping.convolution import ActiveConv2d, Method

LOADS = 2  # outputs that computing takes as long as, to load what a block reads of an input
WORTH = 0.6  # of the time of all kernels; what is dense is carried out in fewer products


class Block(NamedTuple):
    """Hold outputs that read the same inputs."""

    inputs: tuple[int, ...]
    outputs: list[int]


def list_blocks(weight_KC: Tensor) -> list[Block]:
    """List the sets of outputs whose kernels are zero for the same inputs."""
    blocks: dict[tuple[int, ...], Block] = {}
    for output, is_read_C in enumerate((weight_KC.flatten(2) != 0).any(2)):
        inputs = tuple(is_read_C.nonzero().flatten().tolist())
        blocks.setdefault(inputs, Block(inputs, [])).outputs.append(output)
    return list(blocks.values())


def pays(blocks: list[Block], channels: int, kernels: int) -> bool:
    """Tell whether blocks one by one take less time than all kernels at once, about."""
    work = sum(len(inputs) * (len(outputs) + LOADS) for inputs, outputs in blocks)
    return work < WORTH * channels * kernels


def make_convolution(conv: nn.Conv2d, relu: bool, method: Method) -> ActiveConv2d:
    """Make a convolution that leaves out closed blocks, unless that hardly saves anything."""
    blocks = list_blocks(conv.weight.detach())
    is_sparse = pays(blocks, conv.in_channels, conv.out_channels)
    return BlockConv2d(conv, relu, blocks, method) if is_sparse else ActiveConv2d(conv, relu, method=method)


class BlockConv2d(ActiveConv2d):
    """Convolve block by block, unless the active channels are those that a module engages."""

    def __init__(self, conv: nn.Conv2d, relu: bool, blocks: list[Block], method: Method = "kernel") -> None:
        super().__init__(conv, relu, method=method)
        self.blocks = blocks
        self._lists: dict[int, list[tuple[Active, Active]]] = {}  # by batch size

    def _list_calls(
        self, batch: int, reads: Active | None, writes: Active | None
    ) -> list[tuple[Active, Active]]:
        if reads or writes:
            return super()._list_calls(batch, reads, writes)
        if batch not in self._lists:
            kernels, channels, *_ = self.weight.shape
            self._lists[batch] = [
                (_list_channels(batch, inputs, channels), _list_channels(batch, outputs, kernels))
                for inputs, outputs in self.blocks
            ]
        return self._lists[batch]

    def _count_channels(self) -> tuple[int, int]:
        channels = sum(len(inputs) for inputs, _ in self.blocks) // len(self.blocks)
        return max(channels, 1), max(len(self.weight) // len(self.blocks), 1)


def _list_channels(batch: int, numbers: tuple[int, ...] | list[int], channels: int) -> Active:
    """List the same channels of all samples, which are not multiplied by anything."""
    channel_BK = torch.zeros(batch, channels, dtype=torch.int32)
    channel_BK[:, : len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    count_B = torch.full((batch,), len(numbers), dtype=torch.int32)
    return Active(channel_BK, count_B, torch.ones(batch, channels))
