"""Call the compiled kernel, and record its calls to repeat them at once.

Python needs about 10 µs for a call, as long as a small layer; but the calls that layers make for inputs of
one shape are the same each time, down to the addresses. A `Tape` of them is played in one call, as CUDA
graphs are.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elastic.dynamic.skipping import compiling
from elastic.dynamic.skipping.compiling import MAX_ARGUMENTS, Step, Steps

FUNCTIONS = {
    name: i for i, name in enumerate(("convolution", "engage", "max_pool", "classify"))
}  # as in the kernel

Argument = Tensor | ctypes.Structure | int | None
Call = tuple[int, tuple[Argument, ...]]


class Tape:
    """Record calls of the kernel as they are made for inputs of one shape, and the results that they leave.

    Args:
        inputs: tensors of that shape, which are copied; `play` takes others like them.
        layers: what calls the kernel for the copies, and does nothing else to tensors.
    """

    def __init__(self, inputs: Sequence[Tensor], layers: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.calls: list[Call] = []  # they hold what the addresses are of
        self.playable = True  # if nothing but calls was done
        with torch.inference_mode(False):
            self.inputs = [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs]
            _thread.tape = self
            try:
                self.results = layers(self.inputs)
            finally:
                _thread.tape = None
        self.steps = _make_steps(self.calls)

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
        self.workspace = torch.empty(0)


_thread = _Thread()


def call(name: str, *arguments: Argument) -> None:
    """Call a function of the kernel; tensors and structures stand for their addresses."""
    recorded = FUNCTIONS[name], arguments
    _run(_make_steps([recorded]))
    if _thread.tape is not None:
        _thread.tape.calls.append(recorded)


def interrupt() -> None:
    """Note that torch computes between the calls: what is being recorded cannot be played."""
    if _thread.tape is not None:
        _thread.tape.playable = False


def get_workspace(floats: int) -> Tensor:
    """Get memory of this thread's own, to be used in the next call."""
    if _thread.workspace.numel() < floats:
        _thread.workspace = torch.empty(floats)
    return _thread.workspace


def _make_steps(calls: Sequence[Call]) -> Steps:
    numbers = ctypes.c_int64 * MAX_ARGUMENTS
    steps = [Step(function, numbers(*map(_to_number, arguments))) for function, arguments in calls]
    return (Step * len(steps))(*steps)


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
