"""Find the blocks of a weight: outputs whose kernels are zero for the same inputs.

They are convolved together, from the inputs that they read alone. Where gates close in blocks there are few
such sets of outputs; scattered zeros leave each output inputs of its own, and save less.
"""

import ctypes
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate, chain

import torch
from torch import Tensor

LOADS = 2  # outputs that computing takes as long as, to load what a block reads of an input: measured
WORTH = 0.85  # of the time of all kernels at once
SLACK = 64  # floats that vectors may read beyond the last kernel


class BlockTable(ctypes.Structure):
    """List blocks as the kernel's `Blocks` does, by addresses."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("in", "in_begin", "out", "out_begin", "number")),
        ("count", ctypes.c_int32),
    ]


class Blocks:
    """Hold sets of outputs that read the same inputs.

    Attributes:
        work: the time that they take, as a part of that of all kernels, about.
    """

    def __init__(self, outputs: dict[tuple[int, ...], list[int]], channels: int, kernels: int) -> None:
        work = sum(len(reads) * (len(writes) + LOADS) for reads, writes in outputs.items())
        self.work, self.count = work / (channels * kernels), len(outputs)
        number = torch.arange(channels, dtype=torch.int32, device="cpu")
        self.lists = (*_join(outputs), *_join(outputs.values()), number)

    @property
    def table(self) -> BlockTable:
        """List the blocks for the compiled kernel, as long as this is there."""
        return BlockTable(*(numbers.data_ptr() for numbers in self.lists), self.count)

    def pack(self, weight_KC: Tensor) -> Tensor:
        """Move the kernels of each output that are read to the front, so that they are read in order."""
        reads, begins, writes, ends, _ = self.lists
        packed = weight_KC.new_zeros(weight_KC.numel() + SLACK)[: weight_KC.numel()].view(weight_KC.shape)
        for block in range(self.count):
            inputs = reads[begins[block] : begins[block + 1]]
            outputs = writes[ends[block] : ends[block + 1]]
            packed[outputs, : len(inputs)] = weight_KC[outputs][:, inputs]
        return packed


def _join(lists: Iterable[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Join lists of channels into one, and tell where each begins."""
    lists = list(lists)
    begins = accumulate(map(len, lists), initial=0)
    numbers = partial(torch.tensor, dtype=torch.int32, device="cpu")
    return numbers([*chain(*lists)]), numbers([*begins])


def find_blocks(weight_KC: Tensor) -> Blocks | None:
    """Find the blocks of a weight; None where to compute them one by one hardly saves anything."""
    outputs: dict[tuple[int, ...], list[int]] = {}
    for output, is_read_C in enumerate((weight_KC.flatten(2) != 0).any(2)):
        outputs.setdefault(tuple(is_read_C.nonzero().flatten().tolist()), []).append(output)
    blocks = Blocks(outputs, weight_KC.shape[1], len(weight_KC))
    return blocks if blocks.work < WORTH else None
