"""Choose the memory format in which a network is trained."""

from collections.abc import Iterable

import lightning as L
import torch
from torch import nn

ONEDNN_BLOCK = 16  # channels, with AVX-512; 8 with AVX2


def choose_memory_format(nets: Iterable[nn.Module], trainer: L.Trainer | None) -> torch.memory_format:
    """Return channels last, which is faster, unless a kernel cannot be trusted with it.

    Args:
        nets: all networks that are trained.
        trainer: of their run, once there is one.
    """
    overruns = trainer is not None and _is_in_fp32_on_cpu(trainer) and any(map(_overruns, nets))
    return torch.contiguous_format if overruns else torch.channels_last


def _is_in_fp32_on_cpu(trainer: L.Trainer) -> bool:
    """Tell whether a run computes convolutions on a CPU in fp32, without autocast."""
    return trainer.strategy.root_device.type == "cpu" and trainer.precision == "32-true"


def _overruns(net: nn.Module) -> bool:
    """Tell whether oneDNN may write where it must not, going back through tensors laid out channels last.

    It does in 1×1 convolutions of a stride beyond 1 that read fewer channels than its block of 8 or 16:
    https://github.com/uxlfoundation/oneDNN/issues/6035 (torch 2.14 too).
    """
    pointwise = (m for m in net.modules() if isinstance(m, nn.Conv2d) and set(m.kernel_size) == {1})
    return any(max(m.stride) > 1 and m.in_channels < ONEDNN_BLOCK for m in pointwise)
