"""Compile the kernel on first use, for the processor at hand, and keep it in the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).with_name("kernel")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
CACHE = "ELASTIC_CACHE"  # the environment's name for a folder other than the user's cache
MAX_ARGUMENTS = 16  # as in the kernel
TIMEOUT_S = 300  # of the compiler
LOG = logging.getLogger(__name__)


class ConvolutionShape(ctypes.Structure):
    """Describe a convolution as the kernel's `Shape` does."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            *("channels", "height", "width", "kernels", "kernel_height", "kernel_width"),
            *("stride", "pad", "out_height", "out_width", "algorithm"),
        )
    ]


class PoolShape(ctypes.Structure):
    """Describe a max pooling as the kernel's `Pool` does."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("channels", "height", "width", "size", "stride", "pad", "out_height", "out_width")
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
        self.path = path
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


class _NoKernel(Exception):
    """Say why there is no kernel, and what to do."""


@functools.cache
def load_kernel() -> Kernel | None:
    """Load the kernel; where it can neither be loaded nor compiled that is said, once, and there is none."""
    try:
        return _load()
    except _NoKernel as reason:
        LOG.warning("kernels are skipped by stock PyTorch, which saves less time: %s", reason)
        return None


def _load() -> Kernel:
    """Load the kernel from the cache, or compile it into it.

    What is loaded runs as the user; so nobody else may have put it there. A damaged library would end the
    process: its name has its digest, and one that has another is made again.
    """
    command = _find_compiler()
    folder = _open_cache()
    name = f"active-{_digest_sources(command)[:16]}"
    try:
        for library in folder.glob(f"{name}-*.so"):
            if _belongs_to_user(library) and library.stem == f"{name}-{_digest(library.read_bytes())}":
                return Kernel(library)
            library.unlink()
        return Kernel(_compile(command, folder, name))
    except OSError as error:
        raise _NoKernel(f"{folder} cannot be used ({error}); set {CACHE} to another folder") from error


def _find_compiler() -> list[str]:
    """Find the compiler, and all its flags."""
    program, *flags = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    compiler = shutil.which(program)
    if compiler is None:
        raise _NoKernel(f"there is no C++ compiler '{program}'; install one, or set CXX to its name")
    return [compiler, *flags, *FLAGS]


def _open_cache() -> Path:
    """Make the folder that libraries are kept in, unless it is there and the user's own."""
    path = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "elastic-cnn")
    try:
        folder = Path(path).expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # of the second kind: there is no home folder
        raise _NoKernel(f"{path} cannot be used ({error}); set {CACHE} to another folder") from error
    if not _belongs_to_user(folder):
        raise _NoKernel(f"{folder} is others', or they may write to it; set {CACHE} to a folder of your own")
    return folder


def _belongs_to_user(path: Path) -> bool:
    status = path.stat()
    owned = not hasattr(os, "getuid") or status.st_uid == os.getuid()  # Windows has its own rules
    return owned and not status.st_mode & stat.S_IWOTH


def _digest_sources(command: list[str]) -> str:
    """Digest all that the machine code depends on."""
    sources = [source.read_bytes() for source in sorted(SOURCES.glob("*.[ch]*"))]
    machine = " ".join([*command, _describe_processor()]).encode()
    return _digest(b"".join([*sources, machine]))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _compile(command: list[str], folder: Path, name: str) -> Path:
    """Compile the kernel into a library whose name ends with its digest."""
    with tempfile.TemporaryDirectory(dir=folder) as part_folder:  # another process may do the same
        part = Path(part_folder, "active.so")
        arguments = [*command, str(SOURCES / "active.cpp"), "-o", str(part)]
        try:
            subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.SubprocessError as error:
            output = getattr(error, "stderr", None) or str(error)
            reason = output.strip().splitlines()[0]
            raise _NoKernel(f"'{command[0]}' fails ({reason}); set CXX to another compiler") from error
        part.chmod(0o700)
        library = folder / f"{name}-{_digest(part.read_bytes())}.so"
        return part.replace(library)


def _describe_processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith("flags")]
    return flags[0] if flags else platform.machine() + platform.processor()
