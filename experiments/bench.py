"""Measure what elasticity costs and saves, each beside the plain way: `python -m experiments.bench`.

Every row times the two sides in turn and gives the median of the ratios ours / theirs, with their range.
Absolute times depend on the machine; ratios much less.
"""

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.modules import iterate_modules
from elastic.dynamic.skipping import make_skipping
from elastic.experiments.tools.composition import CONF, remove_leftovers
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.nested import make_levels
from elastic.experiments.tools.options import call
from elastic.experiments.tools.parts import make_callbacks, make_recipe, make_task
from elastic.experiments.tools.timing import Work, make_forward, make_stock, time_pairs
from elastic.experiments.train import make_trainer
from elastic.levels.cutting import extract_level
from elastic.measure.timing import choose_fastest
from elastic.models import convnet, resnet20, vgg16_bn
from elastic.pruning import gates
from elastic.pruning.compaction import compact
from elastic.pruning.folding import fold_gates
from elastic.surgery.reindexing import grow_index, reindex
from elastic.training.compilation import compile_network
from elastic.training.module import ElasticModule
from elastic.widths.discovery import discover

Pair = tuple[Work, Work]  # ours, theirs
STEPS = {28: 200, 32: 50}  # of an epoch, by the height of images: starting a run shall not be seen


def make_step(net: nn.Module, x_BCHW: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Work:
    """Make a training step."""
    y_B = torch.zeros(len(x_BCHW), dtype=torch.long)
    optimizer = optimizer or torch.optim.AdamW(net.parameters())

    def step() -> None:
        loss = F.cross_entropy(net(x_BCHW), y_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class EndAfterEpoch(L.Callback):
    """End a run after its first epoch, though it was to last longer."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


def compose_run(*options: str) -> DictConfig:
    """Compose the configuration of a run in a temporary folder."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    words = [f"run={folder}", "callbacks.progress=null", "trainer.max_epochs=1000", *options]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", words, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return remove_leftovers(cfg, words, cfg.hydra.runtime.choices)


def make_loader(batches: Any) -> "DataLoader[Any]":
    """Make a loader of whole batches."""
    return DataLoader(batches, batch_size=None)


def make_trained_epoch(net: nn.Module, x_BCHW: Tensor, options: Sequence[str]) -> Pair:
    """Train for an epoch as a run does, its start and its checkpoint included, against a bare loop.

    Args:
        options: of the run.
    """
    plain, x_BCHW = copy.deepcopy(net), x_BCHW.clone()
    step = make_step(plain, x_BCHW)
    y_B = torch.zeros(len(x_BCHW), dtype=torch.long)
    train_loader, val_loader = (make_loader([(x_BCHW, y_B)] * count) for count in (STEPS[x_BCHW.shape[2]], 1))
    cfg = compose_run("trainer.precision=32-true", "lr_scheduler=constant", *options)

    def train() -> None:
        task = make_task(cfg, net(x_BCHW[:1]).shape[1])
        _, C, H, W = x_BCHW.shape
        module = ElasticModule(copy.deepcopy(net), (C, H, W), task, *make_recipe(cfg))
        trainer = make_trainer(cfg, [*make_callbacks(cfg).values(), EndAfterEpoch()], Path(cfg.run))
        trainer.fit(module, train_loader, val_loader)

    def loop() -> None:
        for _ in train_loader:
            step()

    return train, loop


def make_compacted_forward(net: nn.Module, x_BCHW: Tensor) -> Pair:
    """Gate off half of every layer's channels: removed, against masked."""
    gates.attach_gates(net, discover(net, x_BCHW), "channel")
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data[::2] = -1
    masked = fold_gates(net).eval()
    return make_forward(compact(net, x_BCHW), x_BCHW), make_forward(masked, x_BCHW)


def make_growth(net: nn.Module, x_BCHW: Tensor) -> Pair:
    """Grow every width by a channel, AdamW's state included, against one training step."""
    optimizer = torch.optim.AdamW(net.parameters())
    step = make_step(net, x_BCHW, optimizer)
    step()
    widths = discover(net, x_BCHW)

    def grow() -> None:
        reindex(net, widths, {n: grow_index(w.size, 1) for n, w in widths.items()}, optimizers=[optimizer])

    return grow, step


def make_compiled_step(net: nn.Module, x_BCHW: Tensor) -> Pair:
    """Train compiled, once that is done, against eager."""
    compiled = copy.deepcopy(net)
    compile_network(compiled)
    return make_step(compiled, x_BCHW), make_step(net, x_BCHW)


def make_recompilation(net: nn.Module, x_BCHW: Tensor) -> Pair:
    """Take the first compiled step after a growth, against an eager step."""
    compiled = copy.deepcopy(net)
    compile_network(compiled)
    grow, step = make_growth(compiled, x_BCHW)

    def grow_and_step() -> None:
        grow()
        torch.compiler.reset()
        step()

    return grow_and_step, make_step(net, x_BCHW)


def make_core_forward(net: nn.Module, x_BCHW: Tensor) -> Pair:
    """Run the smallest of four levels on parts of the network's tensors, against the same with its own."""
    core = make_levels(net.eval(), x_BCHW)[0].eval()
    return make_forward(core, x_BCHW), make_forward(extract_level(core), x_BCHW)


def make_joint_gradients(net: nn.Module, x_BCHW: Tensor) -> Pair:
    """Compute gradients of all four levels through the network's tensors, against those of four networks."""
    levels = make_levels(net, x_BCHW)
    extracted = [extract_level(level).requires_grad_() for level in levels]

    def compute_jointly() -> None:
        losses = [levels.run(k, x_BCHW).square().mean() for k in range(len(levels))]
        torch.autograd.backward(losses)

    def compute_each() -> None:
        for level in extracted:
            level(x_BCHW).square().mean().backward()

    return compute_jointly, compute_each


def make_skipped_forward(net: nn.Module, x_BCHW: Tensor) -> Pair:
    """Run with about half of the kernels that modules switch, against the fastest stock execution."""
    dynamic = attach_modules(net.eval(), discover(net, x_BCHW))
    for module in iterate_modules(dynamic):
        for parameter in module.heads.parameters():
            nn.init.normal_(parameter)
    dense = choose_fastest(list(make_stock(net).values()), [x_BCHW])
    return make_forward(make_skipping(dynamic, [x_BCHW]), x_BCHW), make_forward(dense, x_BCHW)


def make_discovery(net: nn.Module, x_BCHW: Tensor) -> Pair:
    """Discover widths, against Torch-Pruning's dependency graph (extra `peers`)."""
    import torch_pruning

    return (
        lambda: discover(net, x_BCHW),
        lambda: torch_pruning.DependencyGraph().build_dependency(net, example_inputs=x_BCHW),
    )


@dataclass(frozen=True)
class Comparison:
    """Hold a row of the table: two sides, the network and the images they are made of, how often they run."""

    name: str
    make: Callable[[nn.Module, Tensor], Pair]
    net: Callable[[], nn.Module]
    repeats: int
    images: int = 128
    shape: tuple[int, int, int] = (3, 32, 32)


TRAINER = partial(make_trained_epoch, options=("schedule=static",))
GATES = partial(
    make_trained_epoch,
    options=("schedule=gates", "callbacks.gates.begin=0.0", "callbacks.gates.budget=5000"),
)
COMPARISONS = (
    Comparison("trainer, nothing elastic / bare loop, convnet", TRAINER, convnet, 3, shape=(1, 28, 28)),
    Comparison("trainer, gates and a budget / bare loop, convnet", GATES, convnet, 3, shape=(1, 28, 28)),
    Comparison("trainer, nothing elastic / bare loop, resnet20", TRAINER, resnet20, 3),
    Comparison("trainer, gates and a budget / bare loop, resnet20", GATES, resnet20, 3),
    Comparison(
        "compacted / masked forward, half the channels, resnet20", make_compacted_forward, resnet20, 10
    ),
    Comparison("growing all widths / one training step, resnet20", make_growth, resnet20, 5),
    Comparison("compiled / eager training step, resnet20", make_compiled_step, resnet20, 5),
    Comparison("first compiled step after growth / eager step, resnet20", make_recompilation, resnet20, 2),
    Comparison("core in place / extracted, one image, resnet20", make_core_forward, resnet20, 200, 1),
    Comparison("core in place / extracted, one image, vgg16_bn", make_core_forward, vgg16_bn, 50, 1),
    Comparison("step of 4 levels / steps of 4 such networks, resnet20", make_joint_gradients, resnet20, 3),
    Comparison("half of the kernels / stock, one image, resnet20", make_skipped_forward, resnet20, 100, 1),
    Comparison("half of the kernels / stock, one image, vgg16_bn", make_skipped_forward, vgg16_bn, 50, 1),
    Comparison("half of the kernels / stock, resnet20", make_skipped_forward, resnet20, 5),
    Comparison("half of the kernels / stock, vgg16_bn", make_skipped_forward, vgg16_bn, 3),
    Comparison("discovery / Torch-Pruning's graph, resnet20", make_discovery, resnet20, 10, 1),
)


def run_benchmarks() -> None:
    """Show what elasticity costs and saves, a row a comparison."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    table = Table(title=f"{torch.get_num_threads()} threads, batch 128, fp32, torch {torch.__version__}")
    for column in ("ours / theirs", "ours, ms", "theirs, ms", "ratio", "range"):
        table.add_column(column)
    for comparison in COMPARISONS:
        x_BCHW = torch.randn(comparison.images, *comparison.shape)
        try:
            pair = comparison.make(comparison.net(), x_BCHW)
        except ImportError:
            table.add_row(comparison.name, "", "", "", "not installed")
            continue
        times = time_pairs(*pair, comparison.repeats)
        table.add_row(comparison.name, *times.format_medians(1))
    Console(width=110).print(table)


def main() -> None:
    silence()
    call(run_benchmarks)


if __name__ == "__main__":
    run(main)
