"""The compiled kernel: found or made, called, and its calls recorded, to be repeated at once.

It is compiled on first use, for the processor at hand, and kept in the user's cache. Python needs about 10 µs
for a call, as long as a small layer; but the calls that layers make for inputs of one shape are the same each
time, down to the addresses. A `Tape` of them is played in one call, as CUDA graphs are.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).with_name("kernel")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
CACHE = "ELASTIC_CACHE"  # the environment's name for a folder other than the user's cache
MOST_ARGUMENTS = 16

Argument = Tensor | ctypes.Structure | int | None


class _Step(ctypes.Structure):
    """A call: which of the kernel's functions, and addresses and numbers for it."""

    _fields_ = [("function", ctypes.c_int64), ("arguments", ctypes.c_int64 * MOST_ARGUMENTS)]


FUNCTIONS = {name: i for i, name in enumerate(("convolution", "engage", "max_pool"))}  # as in the kernel


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """The kernel, or None where it cannot be compiled: there is no compiler, or it does not know a flag."""
    program, *flags = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    compiler = shutil.which(program)
    if compiler is None:
        return None
    texts = [source.read_bytes() for source in sorted(SOURCES.glob("*.[ch]*"))]
    made_with = " ".join([compiler, *flags, *FLAGS, _processor()]).encode()
    key = hashlib.sha256(b"".join([*texts, made_with])).hexdigest()
    folder = Path(os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "elastic-cnn"))
    try:
        library = folder.expanduser().absolute() / f"active-{key[:16]}.so"
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as part:  # another process may do the same
                made = Path(part, "active.so")
                command = [compiler, *flags, *FLAGS, str(SOURCES / "active.cpp"), "-o", str(made)]
                subprocess.run(command, check=True, capture_output=True, timeout=300)
                made.replace(library)
        found = ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError, RuntimeError):  # of the last kind: there is no home folder
        return None
    found.active_work.argtypes, found.active_work.restype = [ctypes.c_void_p], ctypes.c_int64
    found.active_run.argtypes, found.active_run.restype = [ctypes.c_void_p, ctypes.c_int32], None
    return found


def _processor() -> str:
    """What the machine code depends on."""
    info = Path("/proc/cpuinfo")
    flags = (
        [line for line in info.read_text().splitlines() if line.startswith("flags")] if info.exists() else []
    )
    return flags[0] if flags else platform.machine() + platform.processor()


class Tape:
    """Calls of the kernel as they were made for inputs of one shape, and the results that they leave.

    Args:
        inputs: tensors of that shape, which are copied; `play` is given others like them.
        layers: what calls the kernel for the copies, and does nothing else to tensors.
    """

    def __init__(self, inputs: Sequence[Tensor], layers: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.calls: list[tuple[int, tuple[Argument, ...]]] = []  # they hold what the addresses are of
        self.plays = True  # if nothing but calls was done
        with torch.inference_mode(False):
            self.inputs = [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs]
            _own.tape = self
            try:
                self.results = layers(self.inputs)
            finally:
                _own.tape = None
        self.steps = (_Step * len(self.calls))(*(_step(*each) for each in self.calls))

    def play(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results for other inputs."""
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given.detach())
        _run(self.steps)
        return [result.clone() for result in self.results]


def call(name: str, *arguments: Argument) -> None:
    """Call a function of the kernel; tensors and structures stand for their addresses."""
    made = FUNCTIONS[name], arguments
    _run((_Step * 1)(_step(*made)))
    if (tape := getattr(_own, "tape", None)) is not None:
        tape.calls.append(made)


def interrupt() -> None:
    """Note that torch computes between the calls: what is being recorded cannot be played."""
    if (tape := getattr(_own, "tape", None)) is not None:
        tape.plays = False


def work(floats: int) -> Tensor:
    """Memory of this thread's own, to be used in the next call."""
    held: Tensor | None = getattr(_own, "work", None)
    if held is None or held.numel() < floats:
        held = _own.work = torch.empty(floats)
    return held


_own = threading.local()


def _step(function: int, arguments: Sequence[Argument]) -> _Step:
    return _Step(function, (ctypes.c_int64 * MOST_ARGUMENTS)(*map(_number, arguments)))


def _number(argument: Argument) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return ctypes.addressof(argument) if isinstance(argument, ctypes.Structure) else int(argument or 0)


def _run(steps: "ctypes.Array[_Step]") -> None:
    library = compiled()
    assert library is not None
    library.active_run(ctypes.addressof(steps), len(steps))
