"""Measure what it takes to go from one sub-network to another, here and elsewhere.

    python -m experiments.switching

Each method goes to and fro between the smallest and the largest sub-network of a ResNet for 32×32 images, and
does all that its authors say must be done before the next answer can be trusted. Once-for-all and ModelOpt
(extra `peers`) have one set of batch norm statistics for all sub-networks, taken anew from data: 2,000 images
by once-for-all's own default, 50 batches (of 128 here) by ModelOpt's. Once-for-all brings its own network.

The second table has the levels of ours: what each takes, in place and extracted.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.nested import make_levels
from elastic.experiments.tools.options import call
from elastic.experiments.tools.timing import make_forward, time_pairs
from elastic.levels.cutting import extract_level
from elastic.levels.runtime import Runtime
from elastic.measure import counts
from elastic.models import resnet20

X_BCHW = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Method:
    """Hold how a library goes from one sub-network to another.

    Attributes:
        switch: to the smallest sub-network (0) or the largest (1).
        finish: what has to follow before the sub-network may answer.
        images: that this needs.
    """

    switch: Callable[[int], Any]
    finish: Callable[[], Any]
    images: int


class ByteCounter(TorchDispatchMode):
    """Count the bytes that operations write into storage of their own, or into what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        storages = {storage for value in args for storage in _list_storages(value)}
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            in_place = storages.intersection(_list_storages(output))
            if not in_place or func._schema.is_mutable:
                self.bytes += getattr(output, "nbytes", 0)
        return outputs


def _list_storages(value: Any) -> list[int]:
    return [value.untyped_storage().data_ptr()] if isinstance(value, Tensor) else []


def compare_switching() -> None:
    """Show what it takes to go from one sub-network to another, here and elsewhere."""
    warnings.simplefilter("ignore")  # the peers' own
    torch.manual_seed(0)
    torch.set_num_threads(1)
    console = Console(width=110)
    console.print(compare_methods())
    console.print(compare_levels(resnet20(), 200))


def make_ours() -> Method:
    """Switch the levels of this library."""
    levels = make_levels(resnet20(), X_BCHW)
    runtime = Runtime(levels, X_BCHW)
    budgets_mb = [runtime.costs[0].memory_mb, runtime.costs[-1].memory_mb]
    return Method(lambda k: runtime.within(memory_mb=budgets_mb[k]), lambda: None, 0)


def make_once_for_all() -> Method:
    """Switch the sub-networks of once-for-all."""
    from ofa.imagenet_classification.elastic_nn.networks import OFAResNets
    from ofa.imagenet_classification.elastic_nn.utils import set_running_statistics

    net = OFAResNets(
        10, depth_list=[0, 1, 2], expand_ratio_list=[0.2, 0.25, 0.35], width_mult_list=[0.65, 1.0]
    )
    data = [(torch.randn(200, 3, 32, 32), None) for _ in range(10)]

    def switch(k: int) -> None:
        net.set_active_subnet(d=2 * k, e=(0.2, 0.35)[k], w=k)

    return Method(switch, lambda: set_running_statistics(net.eval(), data), 2000)


def make_modelopt() -> Method:
    """Switch the sub-networks of ModelOpt."""
    import modelopt.torch.nas as nas

    data = [torch.randn(128, 3, 32, 32) for _ in range(50)]
    net = nas.convert(resnet20(), mode="autonas")
    ends = [nas.sample(net, extreme) for extreme in (min, max)]

    def finish() -> None:
        nas.patch.prep_for_eval(net, lambda model: [model(x_BCHW) for x_BCHW in data])

    return Method(lambda k: nas.select(net, ends[k]), finish, 50 * 128)


METHODS: dict[str, tuple[Callable[[], Method], int]] = {  # and how often each is measured
    "ours": (make_ours, 1000),
    "once-for-all": (make_once_for_all, 5),
    "ModelOpt": (make_modelopt, 5),
}


def measure(method: Method, repeats: int) -> tuple[list[float], list[float], int]:
    """Measure the microseconds of each switch, without and with what has to follow, and the bytes of one."""
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        method.switch(i % 2)
        middle = time.perf_counter()
        method.finish()
        times.append((1e6 * (middle - start), 1e6 * (time.perf_counter() - start)))
    with ByteCounter() as counter:
        method.switch(repeats % 2)
        method.finish()
    switch_us, total_us = map(list, zip(*times[2:], strict=True))
    return switch_us, total_us, counter.bytes


def compare_methods() -> Table:
    """Measure every method that is installed."""
    table = Table("method", "switch, µs", "until it may answer, µs", "range", "bytes moved", "images")
    for name, (make, repeats) in METHODS.items():
        try:
            method = make()
        except ImportError:
            table.add_row(name, "not installed")
            continue
        switch_us, total_us, moved_bytes = measure(method, repeats)
        medians = (f"{statistics.median(times):,.0f}" for times in (switch_us, total_us))
        spread = f"{min(total_us):,.0f} … {max(total_us):,.0f}"
        table.add_row(name, *medians, spread, f"{moved_bytes:,}", f"{method.images:,}")
    return table


def compare_levels(net: nn.Module, repeats: int) -> Table:
    """Time each level in place and extracted, in turn, for one image."""
    table = Table("level", "params", "macs", "in place, ms", "extracted, ms", "ratio", "range")
    for k, level in enumerate(make_levels(net, X_BCHW)):
        extracted = extract_level(level.eval()).eval()
        times = time_pairs(make_forward(level, X_BCHW), make_forward(extracted, X_BCHW), repeats)
        sizes = counts.count_params(level), counts.count_macs(level, X_BCHW)
        table.add_row(str(k), *(f"{size:,}" for size in sizes), *times.format_medians(3))
    return table


def main() -> None:
    silence()
    call(compare_switching)


if __name__ == "__main__":
    run(main)
