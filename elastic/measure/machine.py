"""Measure what a network costs on this machine: time, memory, energy."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic.errors import FileError
from elastic.measure.timing import WARM_UP, measure_medians_ms
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.mode import preserve_modes, set_mode

RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
REPEATS = 30


@dataclass(frozen=True)
class RunCost:
    """Hold what one input takes: median time, weights and the largest layer's input and output, energy."""

    latency_ms: float
    memory_mb: float
    energy_mj: float | None = None  # None where the machine does not tell


def measure_cost(net: nn.Module, example: Example, joules: Callable[[], float] | None = None) -> RunCost:
    """Measure a network here, on as many threads as torch now uses."""
    energy_before = joules() if joules else 0.0
    latency_ms = measure_latency_ms(net, example, REPEATS)
    energy_mj = 1e3 * (joules() - energy_before) / (REPEATS + WARM_UP) if joules else None
    return RunCost(latency_ms, measure_memory_mb(net, example), energy_mj)


def measure_latency_ms(net: nn.Module, example: Example, repeats: int = REPEATS) -> float:
    """Measure the median time of a forward pass in evaluation mode."""
    with preserve_modes(net):
        (median,) = measure_medians_ms([set_mode(net)], [example] * repeats)
    return median


def measure_memory_mb(net: nn.Module, example: Example) -> float:
    """Measure all weights and buffers, and the largest layer's input and output, in units of 10⁶ bytes."""
    activations: list[int] = []

    def record(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        activations.append(sum(x.nbytes for x in (*inputs, output) if isinstance(x, Tensor)))

    leaves = [layer for layer in net.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(record) for layer in leaves]
    try:
        with torch.inference_mode():
            net(*list_inputs(example))
    finally:
        for hook in hooks:
            hook.remove()
    stored = {id(tensor): tensor.nbytes for tensor in (*net.parameters(), *net.buffers())}
    return (sum(stored.values()) + max(activations, default=0)) / 1e6


def read_rapl_joules() -> float:
    """Read the energy counter of Intel and AMD processors under Linux; it may need rights to be read.

    Raises:
        FileError: the machine has none, or does not let it be read.
    """
    try:
        return int(RAPL.read_text()) / 1e6
    except (OSError, ValueError) as error:
        raise FileError(f"{RAPL} cannot be read: give another counter of joules, or none") from error
