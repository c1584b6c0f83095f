"""Compile the kernel on first use, for the processor at hand, and keep it in the user's cache."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).with_name("kernel")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
CACHE = "ELASTIC_CACHE"  # the environment's name for a folder other than the user's cache
MAX_ARGUMENTS = 16  # as in the kernel


class ConvolutionShape(ctypes.Structure):
    """Describe a convolution as the kernel's `Shape` does."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            *("channels", "height", "width", "kernels", "kernel_height", "kernel_width"),
            *("stride", "pad", "out_height", "out_width", "tiled"),
        )
    ]


class Step(ctypes.Structure):
    """Describe a call: which of the kernel's functions, and addresses and numbers for it."""

    _fields_ = [("function", ctypes.c_int64), ("arguments", ctypes.c_int64 * MAX_ARGUMENTS)]


Steps = ctypes.Array[Step]


class Kernel:
    """Call the functions of a compiled kernel.

    Raises:
        OSError: the file is no library, or not this one.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        try:
            self._work, self._run = library.active_work, library.active_run
        except AttributeError as error:
            raise OSError(f"{path} is another library") from error
        self._work.argtypes, self._work.restype = [ctypes.c_void_p], ctypes.c_int64
        self._run.argtypes, self._run.restype = [ctypes.c_void_p, ctypes.c_int32], None

    def count_work(self, shape: ConvolutionShape) -> int:
        """Count the floats of work that a convolution needs for each thread."""
        return int(self._work(ctypes.addressof(shape)))

    def run(self, steps: Steps) -> None:
        """Carry out calls, one after another."""
        self._run(ctypes.addressof(steps), len(steps))


@functools.cache
def load_kernel() -> Kernel | None:
    """Load the kernel; None where it cannot be compiled: no compiler, or one that does not know a flag."""
    program, *flags = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    compiler = shutil.which(program)
    if compiler is None:
        return None
    command = [compiler, *flags, *FLAGS]
    try:
        library = _find_cache() / f"active-{_digest_sources(command)[:16]}.so"
        if not library.exists():
            _compile(command, library)
        return Kernel(library)
    except (OSError, subprocess.SubprocessError, RuntimeError):  # of the last kind: there is no home folder
        return None


def _find_cache() -> Path:
    folder = Path(os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "elastic-cnn"))
    return folder.expanduser().absolute()


def _digest_sources(command: list[str]) -> str:
    """Digest all that the machine code depends on."""
    sources = [source.read_bytes() for source in sorted(SOURCES.glob("*.[ch]*"))]
    return hashlib.sha256(
        b"".join([*sources, " ".join([*command, _describe_processor()]).encode()])
    ).hexdigest()


def _compile(command: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # another process may do the same
        part = Path(folder, "active.so")
        arguments = [*command, str(SOURCES / "active.cpp"), "-o", str(part)]
        subprocess.run(arguments, check=True, capture_output=True, timeout=300)
        part.replace(library)


def _describe_processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith("flags")]
    return flags[0] if flags else platform.machine() + platform.processor()
