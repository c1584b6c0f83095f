"""What it takes to go from one sub-network to another, here and elsewhere: `python -m experiments.switch`.

Each way goes to and fro between the smallest and the largest sub-network of a ResNet for 32×32 images, and
does all that its authors say must be done before the next answer can be trusted. Once-for-all and ModelOpt
(extra `peers`) have one set of batch norm statistics for all sub-networks, taken anew from data: 2,000 images
by once-for-all's own default, 50 batches (of 128 here) by ModelOpt's. Once-for-all brings its own network.

The second table has the levels of ours: what each takes, in place and extracted.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.experiments.bench import forward, paired
from elastic.levels.cutting import extract_level
from elastic.levels.nested import Levels
from elastic.levels.runtime import Runtime
from elastic.levels.sizes import level_sizes
from elastic.measure import counts
from elastic.models import resnet20
from elastic.widths.discovery import discover

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Switch = Callable[[int], Any]  # to the smallest (0) or the largest (1)
# A switch, what has to follow before the sub-network may answer, and the images that it needs.
Way = tuple[Switch, Callable[[], Any], int]


class Moved(TorchDispatchMode):
    """Counts the bytes that operations write into storage of their own, or into what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for each in out if isinstance(out, (tuple, list)) else [out]:
            viewed = isinstance(each, Tensor) and each.untyped_storage().data_ptr() in known
            if isinstance(each, Tensor) and (not viewed or func._schema.is_mutable):
                self.bytes += each.nbytes
        return out


def ours() -> Way:
    net = resnet20()
    widths = discover(net, X)
    serve = Runtime(Levels(net, widths, level_sizes(net, widths, X, [0.512, 0.64, 0.8])), X)
    budgets = [serve.costs[0].memory_mb, serve.costs[-1].memory_mb]
    return lambda k: serve.within(memory_mb=budgets[k]), lambda: None, 0


def once_for_all() -> Way:
    from ofa.imagenet_classification.elastic_nn.networks import OFAResNets
    from ofa.imagenet_classification.elastic_nn.utils import set_running_statistics

    net = OFAResNets(
        10, depth_list=[0, 1, 2], expand_ratio_list=[0.2, 0.25, 0.35], width_mult_list=[0.65, 1.0]
    )
    data = [(torch.randn(200, 3, 32, 32), None) for _ in range(10)]

    def switch(k: int) -> None:
        net.set_active_subnet(d=2 * k, e=(0.2, 0.35)[k], w=k)

    return switch, lambda: set_running_statistics(net.eval(), data), 2000


def modelopt() -> Way:
    import modelopt.torch.nas as nas

    data = [torch.randn(128, 3, 32, 32) for _ in range(50)]
    net = nas.convert(resnet20(), mode="autonas")
    ends = [nas.sample(net, least) for least in (min, max)]

    def settle() -> None:
        nas.patch.prep_for_eval(net, lambda model: [model(x_BCHW) for x_BCHW in data])

    return lambda k: nas.select(net, ends[k]), settle, 50 * 128


def measure(way: Way, repeats: int) -> tuple[list[float], list[float], int]:
    """Microseconds of each switch, without and with what has to follow; the bytes that one moves in all."""
    switch, settle, _ = way
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        switch(i % 2)
        switched = time.perf_counter()
        settle()
        times.append((1e6 * (switched - start), 1e6 * (time.perf_counter() - start)))
    with Moved() as moved:
        switch(repeats % 2)
        settle()
    alone_us, whole_us = map(list, zip(*times[2:], strict=True))
    return alone_us, whole_us, moved.bytes


def switches() -> Table:
    table = Table("way", "switch, µs", "until it may answer, µs", "range", "bytes moved", "images")
    for name, make, repeats in [
        ("ours", ours, 1000),
        ("once-for-all", once_for_all, 5),
        ("ModelOpt", modelopt, 5),
    ]:
        try:
            way = make()
        except ImportError:
            table.add_row(name, "not installed")
            continue
        alone_us, whole_us, moved = measure(way, repeats)
        medians = (f"{statistics.median(each):,.0f}" for each in (alone_us, whole_us))
        spread = f"{min(whole_us):,.0f} … {max(whole_us):,.0f}"
        table.add_row(name, *medians, spread, f"{moved:,}", f"{way[2]:,}")
    return table


def latencies(net: nn.Module, repeats: int) -> Table:
    """Each level in place and extracted, in turn, one image."""
    widths = discover(net, X)
    levels = Levels(net, widths, level_sizes(net, widths, X, [0.512, 0.64, 0.8]))
    table = Table("level", "params", "macs", "in place, ms", "extracted, ms", "ratio", "range")
    for k, level in enumerate(levels):
        alone = extract_level(level.eval()).eval()
        a, b, ratios = paired(forward(level, X), forward(alone, X), repeats)
        shown = (
            f"{counts.count_params(level):,}",
            f"{counts.count_macs(level, X):,}",
            f"{a:.3f}",
            f"{b:.3f}",
        )
        spread = f"{min(ratios):.2f} … {max(ratios):.2f}"
        table.add_row(str(k), *shown, f"{statistics.median(ratios):.3f}", spread)
    return table


def compare_switching() -> None:
    """Show what it takes to go from one sub-network to another, here and elsewhere."""
    warnings.simplefilter("ignore")  # the peers' own
    torch.manual_seed(0)
    torch.set_num_threads(1)
    console = Console(width=110)
    console.print(switches())
    console.print(latencies(resnet20(), 200))


def main() -> None:
    compare_switching()


if __name__ == "__main__":
    main()
