"""Time what it takes to find the widths of a network and to halve them all, beside Torch-Pruning.

    python -m experiments.discovery

Both start from the same network and one image of the size that it was made for, in one process, on one
thread, in turn; what is shown is the median of CPU seconds. Torch-Pruning (extra `peers`) builds its graph
of dependencies, and its pruner takes half of the channels of each group by magnitude; ours discovers, and
re-indexes each width to the half of largest L2 norm. Compaction is of the network with half of its gates
shut.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.levels.importance import score_channels
from elastic.models import resnet20
from elastic.pruning.compaction import compact
from elastic.pruning.gates import attach_gates, iterate_gates, set_score
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover

REPEATS = 3
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the pixels of its images
    "ResNet-20": (resnet20, 32),
    "ResNet-50": (torchvision.models.resnet50, 224),
    "ResNet-152": (torchvision.models.resnet152, 224),
    "DenseNet-121": (torchvision.models.densenet121, 224),
    "EfficientNet-B0": (torchvision.models.efficientnet_b0, 224),
    "ConvNeXt-T": (torchvision.models.convnext_tiny, 224),
}


def compare_discovery() -> None:
    """Show what discovery and halving take, here and in Torch-Pruning."""
    warnings.simplefilter("ignore")  # the peer's own
    torch.set_num_threads(1)
    table = Table(title=f"CPU seconds, medians of {REPEATS} · torch {torch.__version__}, one thread")
    columns = ("network", "discover", "their graph", "and halve", "their pruner", "ratio", "compact")
    for column in columns:
        table.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    for name, (build, pixels) in NETWORKS.items():
        table.add_row(name, *measure_network(build, pixels))
    Console(width=110).print(table)


def measure_network(build: Callable[[], nn.Module], pixels: int) -> list[str]:
    """Measure one network: a row of the table."""
    torch.manual_seed(0)
    net, x_BCHW = build().eval(), torch.randn(1, 3, pixels, pixels)
    works = (discover_only, build_graph, halve_by_reindex, halve_by_pruner, compact_half)
    times: dict[Any, list[float]] = {work: [] for work in works}
    for _ in range(REPEATS):
        for work in works:  # in turn: the machine's load falls on all
            times[work].append(measure_cpu_seconds(work, copy.deepcopy(net), x_BCHW))
    found, graph, halved, pruned, compacted = (statistics.median(times[work]) for work in works)
    return [
        *(f"{seconds:.2f}" for seconds in (found, graph, halved, pruned)),
        f"{pruned / halved:.1f} ×",
        f"{compacted:.2f}",
    ]


def measure_cpu_seconds(work: Callable[[nn.Module, Tensor], Any], net: nn.Module, x_BCHW: Tensor) -> float:
    """Measure the CPU time of some work on a network of its own."""
    prepared = attach_shut_gates(net, x_BCHW) if work is compact_half else net
    start = time.process_time()
    work(prepared, x_BCHW)
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
    """Keep half of each group of Torch-Pruning."""
    import torch_pruning as tp

    head = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1]
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
