"""Call the compiled kernel, and record its calls to repeat them at once.

Python needs about 10 µs for a call, as long as a small layer; but the calls that layers make for inputs of
one shape are the same each time, down to the addresses. A `Tape` of them is played in one call, as CUDA
graphs are.
"""

import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from elastic.dynamic.skipping import compiling
from elastic.dynamic.skipping.compiling import MAX_ARGUMENTS, Step, Steps

NAMES = ("convolution", "engage", "max_pool", "classify", "convolve_blocks")  # as in the kernel
FUNCTIONS = {name: i for i, name in enumerate(NAMES)}

# Whatever a program has made torch's defaults: the kernel reads addresses.
make_floats = partial(torch.empty, dtype=torch.float32, device="cpu")

Argument = Tensor | ctypes.Structure | int | None


class Tape:
    """Record calls of the kernel as they are made for inputs of one shape, and the results that they leave.

    What layers allocate and drop is used again for what comes behind, so that it stays in the cache.

    Args:
        inputs: tensors of that shape, which are copied; `play` takes others like them.
        layers: what calls the kernel for the copies, and does nothing else to tensors.

    Attributes:
        memory: what has been allocated, by its address.
    """

    def __init__(self, inputs: Sequence[Tensor], layers: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.playable = True  # if nothing but calls was done
        self.memory: dict[int, Tensor] = {}
        self._free: dict[int, Tensor] = {}
        self._calls: list[Step] = []
        self._operands: list[Argument] = []  # what else addresses are of
        with torch.inference_mode(False):
            self.inputs = [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs]
            _thread.tape = self
            try:
                self.results = layers(self.inputs)
            finally:
                _thread.tape = None
        self.steps = (Step * len(self._calls))(*self._calls)

    def record(self, step: Step, arguments: Sequence[Argument]) -> None:
        """Add a call, and keep what it needs, but for what has been allocated here."""
        self._calls.append(step)
        self._operands.extend(x for x in arguments if not self._has_allocated(x))

    def _has_allocated(self, x: Argument) -> bool:
        return isinstance(x, Tensor) and x.data_ptr() in self.memory

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Take memory that is free, or new one. It is free again when nothing has the tensor any more."""
        size = math.prod(shape)
        fits = [memory for memory in self._free.values() if size <= len(memory) <= 2 * size]
        memory = min(fits, key=len) if fits else make_floats(size)
        address = memory.data_ptr()
        self._free.pop(address, None)
        self.memory[address] = memory
        x = memory[:size].view(dtype).view(*shape)
        weakref.finalize(x, self._free.__setitem__, address, memory).atexit = False
        return x

    def play(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compute the results for other inputs."""
        for copy, value in zip(self.inputs, inputs, strict=True):
            copy.copy_(value.detach())
        _run(self.steps)
        return [result.clone() for result in self.results]


class _Thread(threading.local):
    """Hold what each thread has of its own."""

    def __init__(self) -> None:
        self.tape: Tape | None = None
        self.workspace = make_floats(0)


_thread = _Thread()


def call(name: str, *arguments: Argument) -> None:
    """Call a function of the kernel; tensors and structures stand for their addresses."""
    numbers = (ctypes.c_int64 * MAX_ARGUMENTS)(*map(_to_number, arguments))
    step = Step(FUNCTIONS[name], numbers)
    _run((Step * 1)(step))
    if _thread.tape is not None:
        _thread.tape.record(step, arguments)


def allocate(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a tensor, of entries of four bytes, for the kernel to fill."""
    if _thread.tape is not None:
        return _thread.tape.allocate(shape, dtype)
    return torch.empty(shape, dtype=dtype, device="cpu")


def interrupt() -> None:
    """Note that torch computes between the calls: what is being recorded cannot be played."""
    if _thread.tape is not None:
        _thread.tape.playable = False


def get_workspace(floats: int) -> Tensor:
    """Get memory of this thread's own, to be used in the next call."""
    if _thread.workspace.numel() < floats:
        _thread.workspace = make_floats(floats)
    return _thread.workspace


def _to_number(argument: Argument) -> int:
    match argument:
        case Tensor():
            return argument.data_ptr()
        case ctypes.Structure():
            return ctypes.addressof(argument)
        case _:
            return int(argument or 0)


def _run(steps: Steps) -> None:
    kernel = compiling.load_kernel()
    assert kernel is not None
    kernel.run(steps)
