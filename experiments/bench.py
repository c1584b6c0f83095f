"""What elasticity costs and saves, each beside the plain way in the same run: `python -m experiments.bench`.

Every row times the two sides in turn and gives the median of the ratios ours / theirs, with their range.
Absolute times depend on the machine; ratios much less.
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.modules import iterate_modules
from elastic.dynamic.skipping import make_skipping
from elastic.experiments.latency import stock
from elastic.levels.cutting import extract_level
from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes
from elastic.measure.timing import Network, choose_fastest
from elastic.models import convnet, resnet20, vgg16_bn
from elastic.pruning import gates
from elastic.pruning.compaction import compact
from elastic.pruning.folding import fold_gates
from elastic.surgery.reindexing import grow_index, reindex
from elastic.training.compilation import compile_network
from elastic.widths.discovery import discover

Work = Callable[[], Any]


def paired(ours: Work, theirs: Work, repeats: int) -> tuple[float, float, list[float]]:
    """Median milliseconds of each side, and the ratios pair by pair, after one unmeasured pair."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        pair = []
        for work in (ours, theirs):
            start = time.perf_counter()
            work()
            pair.append(1e3 * (time.perf_counter() - start))
        times.append((pair[0], pair[1]))
    a, b = zip(*times[1:], strict=True)
    return statistics.median(a), statistics.median(b), [x / y for x, y in times[1:]]


def training_step(net: nn.Module, optimizer: torch.optim.Optimizer, x_BCHW: Tensor) -> Work:
    penalised = any(gates.iterate_gates(net))
    y_B = torch.zeros(len(x_BCHW), dtype=torch.long)

    def step() -> None:
        loss = F.cross_entropy(net(x_BCHW), y_B)
        if penalised:
            loss = loss + 1e-4 * gates.compute_penalty(net)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def gated_step(net: nn.Module, x_BCHW: Tensor) -> tuple[Work, Work]:
    gated = copy.deepcopy(net)
    gates.attach_gates(gated, discover(gated, x_BCHW), "weight")
    ours, theirs = (
        training_step(model, torch.optim.AdamW(model.parameters()), x_BCHW) for model in (gated, net)
    )
    return ours, theirs


def compacted_forward(net: nn.Module, x_BCHW: Tensor) -> tuple[Work, Work]:
    """Half of every layer's channels gated off: removed, against masked."""
    widths = discover(net, x_BCHW)
    gates.attach_gates(net, widths, "channel")
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data[::2] = -1
    return forward(compact(net, x_BCHW), x_BCHW), forward(fold_gates(net).eval(), x_BCHW)


def growth(net: nn.Module, x_BCHW: Tensor) -> tuple[Work, Work]:
    """Growing every width by a channel, AdamW's state included, against one training step."""
    optimizer = torch.optim.AdamW(net.parameters())
    step = training_step(net, optimizer, x_BCHW)
    step()
    widths = discover(net, x_BCHW)

    def grow() -> None:
        reindex(net, widths, {n: grow_index(w.size, 1) for n, w in widths.items()}, optimizers=[optimizer])

    return grow, step


def compiled_step(net: nn.Module, x_BCHW: Tensor) -> tuple[Work, Work]:
    """Compiled against eager, once that is done."""
    compiled = copy.deepcopy(net)
    compile_network(compiled)
    ours, theirs = (
        training_step(model, torch.optim.AdamW(model.parameters()), x_BCHW) for model in (compiled, net)
    )
    return ours, theirs


def recompilation(net: nn.Module, x_BCHW: Tensor) -> tuple[Work, Work]:
    """The first compiled step after a growth, against an eager step."""
    compiled = copy.deepcopy(net)
    compile_network(compiled)
    grow, step = growth(compiled, x_BCHW)

    def regrown() -> None:
        grow()
        torch.compiler.reset()
        step()

    return regrown, training_step(net, torch.optim.AdamW(net.parameters()), x_BCHW)


def forward(net: Network, x_BCHW: Tensor) -> Work:
    def run() -> None:
        with torch.inference_mode():
            net(x_BCHW)

    return run


def level_in_place(net: nn.Module, x_BCHW: Tensor) -> tuple[Work, Work]:
    """The smallest of four levels on parts of the network's tensors, against the same with its own."""
    widths = discover(net, x_BCHW)
    levels = Levels(net.eval(), widths, level_sizes(net, widths, x_BCHW, [0.512, 0.64, 0.8]))
    core = levels[0].eval()
    return forward(core, x_BCHW), forward(extract_level(core), x_BCHW)


def joint_step(net: nn.Module, x_BCHW: Tensor) -> tuple[Work, Work]:
    """Gradients of all four levels through the network's tensors, against those of four networks."""
    widths = discover(net, x_BCHW)
    levels = Levels(net, widths, level_sizes(net, widths, x_BCHW, [0.512, 0.64, 0.8]))
    alone = [extract_level(level).requires_grad_() for level in levels]

    def together() -> None:
        losses = [levels.run(k, x_BCHW).square().mean() for k in range(len(levels))]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]

    def apart() -> None:
        for each in alone:
            each(x_BCHW).square().mean().backward()

    return together, apart


def skipped_forward(net: nn.Module, x_BCHW: Tensor) -> tuple[Work, Work]:
    """About half of the kernels that modules switch are on, against the fastest way of stock torch."""
    gated = attach_modules(net.eval(), discover(net, x_BCHW))
    for module in iterate_modules(gated):
        for parameter in module.heads.parameters():
            nn.init.normal_(parameter)
    dense = choose_fastest(list(stock(net).values()), [x_BCHW])
    return forward(make_skipping(gated, [x_BCHW]), x_BCHW), forward(dense, x_BCHW)


def discovery(net: nn.Module, x_BCHW: Tensor) -> tuple[Work, Work] | None:
    """Against Torch-Pruning's dependency graph, where that is installed (extra `peers`)."""
    try:
        import torch_pruning
    except ImportError:
        return None
    return (
        lambda: discover(net, x_BCHW),
        lambda: torch_pruning.DependencyGraph().build_dependency(net, example_inputs=x_BCHW),
    )


def main() -> None:
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    small, large = torch.randn(128, 1, 28, 28), torch.randn(128, 3, 32, 32)
    rows = [
        ("gated / plain training step, convnet", gated_step(convnet(), small), 30),
        ("gated / plain training step, resnet20", gated_step(resnet20(), large), 5),
        ("compacted / masked forward, half the channels, resnet20", compacted_forward(resnet20(), large), 10),
        ("growing all widths / one training step, resnet20", growth(resnet20(), large), 5),
        ("compiled / eager training step, resnet20", compiled_step(resnet20(), large), 5),
        ("first compiled step after growth / eager step, resnet20", recompilation(resnet20(), large), 2),
        ("core in place / extracted, one image, resnet20", level_in_place(resnet20(), large[:1]), 200),
        ("core in place / extracted, one image, vgg16_bn", level_in_place(vgg16_bn(), large[:1]), 50),
        ("step of 4 levels / steps of 4 such networks, resnet20", joint_step(resnet20(), large), 3),
        (
            "half of the kernels / stock, one image, resnet20",
            skipped_forward(resnet20(), large[:1]),
            100,
        ),
        (
            "half of the kernels / stock, one image, vgg16_bn",
            skipped_forward(vgg16_bn(), large[:1]),
            50,
        ),
        ("half of the kernels / stock, resnet20", skipped_forward(resnet20(), large), 5),
        ("half of the kernels / stock, vgg16_bn", skipped_forward(vgg16_bn(), large), 3),
        ("discovery / Torch-Pruning's graph, resnet20", discovery(resnet20(), large[:1]), 10),
    ]
    table = Table(title=f"{torch.get_num_threads()} threads, batch 128, fp32, torch {torch.__version__}")
    for column in ("ours / theirs", "ours, ms", "theirs, ms", "ratio", "range"):
        table.add_column(column)
    for name, sides, repeats in rows:
        if sides is None:
            table.add_row(name, "", "", "", "not installed")
            continue
        a, b, ratios = paired(*sides, repeats)
        spread = f"{min(ratios):.2f} … {max(ratios):.2f}"
        table.add_row(name, f"{a:.1f}", f"{b:.1f}", f"{statistics.median(ratios):.2f}", spread)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
