"""Say what this machine computes with, and in which precision it trains fastest."""

from pathlib import Path

import torch


def find_device() -> str:
    """Find what this machine computes with."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return find_cpu()


def find_cpu() -> str:
    """Find the name of this processor, and how many threads torch uses of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return f"{names[0]}, {torch.get_num_threads()} threads" if names else "CPU"


def choose_precision(precision: str) -> str:
    """Choose for `auto` bf16 autocast where it makes the GPU or CPU faster, and fp32 elsewhere."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if _is_faster_in_bf16() else "32-true"


def _is_faster_in_bf16() -> bool:
    """Tell whether this CPU trains faster in bf16.

    Without instructions for it, it is emulated. With vectors alone, AMD's are faster in it, Intel's slower
    (ResNet-20 takes 1.2 to 1.4 times as long), unless they have units for matrices (AMX).
    """
    has_matrices = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    has_vectors = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return has_matrices or (has_vectors and "Intel" not in find_cpu())
