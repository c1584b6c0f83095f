"""Time what it takes to find the widths of a network and to halve them all, beside Torch-Pruning.

    python -m experiments.discovery [networks=<names>]

Both start from the same network and one image of the size that it was made for, in one process, on one
thread, in turn; what is shown is the median of CPU seconds. Torch-Pruning (extra `peers`) builds its graph
of dependencies, and its pruner takes half of the channels of each group by magnitude; ours discovers, and
re-indexes each width to the half of largest L2 norm. Neither checks itself (our `check` is off). Compaction
is of the network with half of its gates shut. A second table shows how ours grow with depth and width.
"""

import copy
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from elastic.errors import OptionError
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.levels.importance import score_channels
from elastic.measure.counts import count_macs
from elastic.models.resnet import resnet, resnet20
from elastic.pruning.compaction import compact
from elastic.pruning.gates import attach_gates, iterate_gates, set_score
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover

REPEATS = 5
Work = Callable[[nn.Module, Tensor], Any]
Build = Callable[[], nn.Module]
NETWORKS: dict[str, tuple[Build, int]] = {  # and the pixels of its images
    "ResNet-20": (resnet20, 32),
    "ResNet-50": (torchvision.models.resnet50, 224),
    "ResNet-152": (torchvision.models.resnet152, 224),
    "DenseNet-121": (torchvision.models.densenet121, 224),
    "EfficientNet-B0": (torchvision.models.efficientnet_b0, 224),
    "ConvNeXt-T": (torchvision.models.convnext_tiny, 224),
}


GROWING: dict[str, tuple[Build, int]] = {
    **{f"ResNet-{6 * n + 2}, width 16": (partial(resnet, n), 32) for n in (3, 6, 12, 24)},
    **{f"ResNet-20, width {width}": (partial(resnet20, width), 32) for width in (32, 64, 128)},
    "ResNet-50": NETWORKS["ResNet-50"],
    "ResNet-101": (torchvision.models.resnet101, 224),
    "ResNet-152": NETWORKS["ResNet-152"],
}
COLUMNS = ("network", "discover", "their graph", "ratio", "and halve", "their pruner", "ratio", "compact")
GROWTH = ("network", "layers", "channels", "discover (ms)", "µs a layer", "MACs", "compact (s)")


def compare_discovery(networks: str | None = None) -> None:
    """Show what discovery and halving take, here and in Torch-Pruning, and how they grow.

    Args:
        networks: of torchvision, by name, with commas between; for them alone, at 224 pixels.

    Raises:
        OptionError: torchvision has no such network.
    """
    warnings.simplefilter("ignore")  # the peer's own
    torch.set_num_threads(1)
    title = f"CPU seconds, medians of {REPEATS} · torch {torch.__version__}, one thread"
    named = NETWORKS if networks is None else {name: (find(name), 224) for name in networks.split(",")}
    show(title, COLUMNS, named, measure_network)
    if networks is None:
        show("How it grows", GROWTH, GROWING, measure_growth)


def find(name: str) -> Build:
    """Find a network of torchvision."""
    if name not in torchvision.models.list_models(torchvision.models):
        raise OptionError(f"torchvision has no network {name}: see torchvision.models.list_models()")
    return partial(torchvision.models.get_model, name, weights=None)


def show(
    title: str,
    columns: Sequence[str],
    networks: Mapping[str, tuple[Build, int]],
    measure: Callable[[nn.Module, Tensor], list[str]],
) -> None:
    """Show a table with a row of measured figures for each network."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    for name, (build, pixels) in networks.items():
        torch.manual_seed(0)
        table.add_row(name, *measure(build().eval(), torch.randn(1, 3, pixels, pixels)))
    Console(width=120).print(table)


def measure_network(net: nn.Module, x_BCHW: Tensor) -> list[str]:
    """Measure one network beside the peer."""
    works = (discover_only, build_graph, halve_by_reindex, halve_by_pruner, compact_half)
    discovery_s, graph_s, halving_s, pruner_s, compaction_s = measure_works(net, x_BCHW, works)
    return [
        *(f"{discovery_s:.3f}", f"{graph_s:.3f}", f"{graph_s / discovery_s:.1f} ×"),
        *(f"{halving_s:.2f}", f"{pruner_s:.2f}", f"{pruner_s / halving_s:.1f} ×", f"{compaction_s:.2f}"),
    ]


def measure_growth(net: nn.Module, x_BCHW: Tensor) -> list[str]:
    """Measure ours, beside the size of the network."""
    discovery_s, compaction_s = measure_works(net, x_BCHW, (discover_only, compact_half))
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in net.modules())
    channels = sum(discover(net, x_BCHW).sizes().values())
    return [
        *(str(layers), f"{channels:,}", f"{1e3 * discovery_s:.1f}", f"{1e6 * discovery_s / layers:.0f}"),
        *(f"{count_macs(net, x_BCHW) / 1e9:.2f} G", f"{compaction_s:.2f}"),
    ]


def measure_works(net: nn.Module, x_BCHW: Tensor, works: Sequence[Work]) -> list[float]:
    """Measure the CPU seconds of several works in turn, each the median of all repeats."""
    times: dict[Work, list[float]] = {work: [] for work in works}
    for _ in range(REPEATS):
        for work in works:  # in turn: the machine's load falls on all
            times[work].append(measure_cpu_seconds(work, copy.deepcopy(net), x_BCHW))
    return [statistics.median(times[work]) for work in works]


def measure_cpu_seconds(work: Work, net: nn.Module, x_BCHW: Tensor) -> float:
    """Measure the CPU time of some work on a network of its own."""
    subject = attach_shut_gates(net, x_BCHW) if work is compact_half else net
    gc.collect()
    start = time.process_time()
    work(subject, x_BCHW)
    return time.process_time() - start


def discover_only(net: nn.Module, x_BCHW: Tensor) -> None:
    discover(net, x_BCHW)


def halve_by_reindex(net: nn.Module, x_BCHW: Tensor) -> None:
    """Keep the half of each width whose weights are largest."""
    widths = discover(net, x_BCHW)
    scores = score_channels(net, widths, "l2")
    reindex(
        net, widths, {n: scores[n].topk(-(-w.size // 2)).indices.sort().values for n, w in widths.items()}
    )


def build_graph(net: nn.Module, x_BCHW: Tensor) -> Any:
    import torch_pruning as tp

    return tp.DependencyGraph().build_dependency(net, example_inputs=x_BCHW)


def halve_by_pruner(net: nn.Module, x_BCHW: Tensor) -> None:
    """Keep half of each group of Torch-Pruning, but for what the last layer writes."""
    import torch_pruning as tp

    head = [layer for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    importance = tp.importance.MagnitudeImportance()
    tp.pruner.BasePruner(net, x_BCHW, importance, pruning_ratio=0.5, ignored_layers=[head]).step()


def attach_shut_gates(net: nn.Module, x_BCHW: Tensor) -> nn.Module:
    """Gate a network, and shut half of the gates."""
    attach_gates(net, discover(net, x_BCHW), "channel")
    generator = torch.Generator().manual_seed(0)
    for _, _, gate in iterate_gates(net):
        set_score(gate, torch.where(torch.rand(gate.score.shape, generator=generator) < 0.5, 1.0, -1.0))
    return net


def compact_half(net: nn.Module, x_BCHW: Tensor) -> None:
    compact(net, x_BCHW)


def main() -> None:
    call(compare_discovery)


if __name__ == "__main__":
    run(main)
