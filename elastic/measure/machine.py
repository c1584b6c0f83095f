"""What a network costs on this machine: time, memory, energy."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.measure.timing import WARM_UP, measure_medians_ms

RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


@dataclass(frozen=True)
class RunCost:
    """What one input takes: median time, weights and the largest layer's input and output, energy."""

    latency_ms: float
    memory_mb: float
    energy_mj: float | None = None  # None where the machine does not tell


def measure_cost(net: nn.Module, example: Tensor, joules: Callable[[], float] | None = None) -> RunCost:
    """Measure a network here, as many threads as torch now uses."""
    before = joules() if joules else 0.0
    repeats = 30
    latency = measure_latency_ms(net, example, repeats)
    energy = 1e3 * (joules() - before) / (repeats + WARM_UP) if joules else None
    return RunCost(latency, measure_memory_mb(net, example), energy)


def measure_latency_ms(net: nn.Module, example: Tensor, repeats: int = 30) -> float:
    """The median time of a forward pass in evaluation mode."""
    training = net.training
    (median,) = measure_medians_ms([net.eval()], [example] * repeats)
    net.train(training)
    return median


def measure_memory_mb(net: nn.Module, example: Tensor) -> float:
    """Bytes of all weights and buffers, and of the largest layer's input and output, in units of 10⁶."""
    moved: list[int] = []

    def note(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        moved.append(sum(x.nbytes for x in (*given, out) if isinstance(x, Tensor)))

    leaves = [layer for layer in net.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(note) for layer in leaves]
    try:
        with torch.inference_mode():
            net(example)
    finally:
        for hook in hooks:
            hook.remove()
    held = {id(t): t.nbytes for t in (*net.parameters(), *net.buffers())}
    return (sum(held.values()) + max(moved, default=0)) / 1e6


def read_rapl_joules() -> float:
    """The energy counter of Intel and AMD processors under Linux; it may need rights to be read.

    Raises:
        StructureError: the machine has none, or does not let it be read.
    """
    try:
        return int(RAPL.read_text()) / 1e6
    except (OSError, ValueError) as error:
        raise StructureError(f"{RAPL} cannot be read: give another counter of joules, or none") from error
