"""Measure a run's network once on the test split, write that down, show it."""

import copy
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchvision
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

import elastic
from elastic.data import ImageData
from elastic.dynamic.loss import ActivationCost
from elastic.dynamic.modules import iterate_modules
from elastic.experiments.tools.composition import list_callbacks
from elastic.experiments.tools.hardware import find_device
from elastic.experiments.tools.metrics import TEST, list_shown
from elastic.experiments.tools.per_image import run_per_image
from elastic.files.atomic import write_atomically
from elastic.files.network import Network
from elastic.files.sums import write_sums
from elastic.measure import counts
from elastic.training.module import ElasticModule
from elastic.training.tasks import Task

# The callbacks that change the network, what is kept of it or what it learns from, as `schedule` names them.
SCHEDULE = ("growth", "resolution", "gates", "magnitude", "ema", "joint", "reconstruct", "dynamic", "distil")
LEVEL_KEYS = ("params", "macs")  # of the summary, that each level has, beside its metrics
DYNAMIC_KEYS = ("macs_dynamic", "sets")  # and where it has kernel activation modules
Row = dict[str, Any]
TEXTS = ("config.yaml", "summary.json", "timeline.jsonl", "history.jsonl")
CHECKOUT = Path(__file__).parents[2]  # where the code is not installed


def measure_network(network: Network, data: ImageData, task: Task) -> Row:
    """Measure a network on the test split, and each of its levels.

    Returns:
        what `measure_level` has of the largest level, and `levels`, if there are several.
    """
    rows = [measure_level(network, data, task, k) for k in range(len(network))]
    metrics = [f"{TEST}{name}" for name in task.list_metrics()]
    keys = (*LEVEL_KEYS, *metrics, *(DYNAMIC_KEYS if network.sets else ()))
    levels = [{"level": k, **{key: row[key] for key in keys}} for k, row in enumerate(rows)]
    return rows[-1] | {"levels": levels if len(levels) > 1 else []}


def measure_level(
    network: Network,
    data: ImageData,
    task: Task,
    level: int | None = None,
    sets: Iterable[int] | None = None,
) -> Row:
    """Measure a level: its metrics on the test split, `params`, `params_dense`, `macs` and `macs_dynamic`.

    With kernel activation modules, metrics and `macs_dynamic`, the mean over the test split, are those with
    the first set, and all counts have the modules in them.

    Args:
        level: the largest by default.
        sets: of the modules, all by default.

    Raises:
        OptionError: there is no such level or set.
    """
    plain, example = network.plain(level), torch.zeros(1, *data.shape)
    size: Row = {
        "params": counts.count_params(plain),
        "params_dense": counts.count_params_dense(plain),
        "levels": [],
        "sets": [],
    }
    indices = range(network.sets) if sets is None else sets
    rows = [_measure_set(network, data, task, level, index) for index in indices]
    if not rows:
        macs = counts.count_macs(plain, example)
        return {**measure_metrics(plain, data, task), **size, "macs": macs, "macs_dynamic": macs}
    dynamic = network.dynamic(level)
    heads = [module.heads[0] for module in iterate_modules(dynamic)]
    for name, count in (("params", counts.count_params), ("params_dense", counts.count_params_dense)):
        size[name] += sum(map(count, heads))
    cost = ActivationCost(dynamic, example)
    first = {key: value for key, value in rows[0].items() if key != "set"}
    return {**size, "sets": rows, **first, "macs": cost.dense_macs + cost.module_macs}


def _measure_set(network: Network, data: ImageData, task: Task, level: int | None, index: int) -> Row:
    images = run_per_image(network.dynamic(level, index), data, task)
    return {"set": index, **images.metrics, "macs_dynamic": round(images.macs)}


def measure_metrics(net: nn.Module, data: ImageData, task: Task) -> dict[str, float]:
    """Measure a network on the official test split, in fp32: `test/<metric>` of each metric of the task."""
    # Of a copy: laid out anew, a level would leave its network.
    judge = ElasticModule(copy.deepcopy(net), data.shape, task, torch.optim.SGD)
    trainer = L.Trainer(
        accelerator="auto", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    with torch.inference_mode():
        measured = trainer.test(judge, data, verbose=False)[0]
    return {f"{TEST}{name}": float(measured[f"{TEST}{name}"]) for name in task.list_metrics()}


def summarise(
    cfg: DictConfig, epochs: int, measured: Row, wall_s: float | None, macs_training: int | None
) -> Row:
    """Make one flat object, under the keys that every run shares.

    Args:
        epochs: that were trained, whatever was planned.
        measured: what the network is, from `measure_network`.
        wall_s: what training took; None where it was not counted.
        macs_training: the same in MACs, see `callbacks.Census`.
    """
    return {
        "experiment": cfg.name,
        "seed": cfg.seed,
        "data": cfg.choices.data,
        "model": cfg.choices.model,
        "schedule": "+".join(name for name in SCHEDULE if name in list_callbacks(cfg)) or "static",
        "epochs": epochs,
        **measured,
        "macs_training": macs_training,
        "wall_s": None if wall_s is None else round(wall_s, 1),
        "git": find_revision(),
        "elastic": elastic.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "lightning": L.__version__,
        "device": find_device(),
    }


def write_summary(summary: Row, folder: Path) -> None:
    """Write the summary of a run that has ended into its folder, atomically, and sum up all texts there."""
    text = json.dumps(summary, indent=2) + "\n"
    write_atomically(folder / "summary.json", lambda part: part.write_text(text))
    write_sums(folder, TEXTS)


@functools.cache
def find_revision() -> str | None:
    """Find the commit of a checkout as it is at the first call, with a mark where it has been changed.

    A copy without its history is told by the environment, in ELASTIC_REVISION.
    """
    if revision := os.environ.get("ELASTIC_REVISION"):
        return revision
    if not (CHECKOUT / "pyproject.toml").exists() or shutil.which("git") is None:
        return None  # installed, there may be a repository around it, of something else
    command = ["git", "describe", "--always", "--dirty"]
    process = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return process.stdout.strip() or None


# --- the tables at the end of a run ---------------------------------------------------------------


def show(summary: Row, history: list[Row], folder: Path) -> None:
    """Show what a run has come to."""
    console = Console()
    console.print(_make_table(summary, history))
    if summary.get("levels"):
        console.print(_make_level_table(summary["levels"]))
    if "budget/reason" in summary:
        print(f"the budget was missed by more than 2 %: {summary['budget/reason']}")
    time = "" if summary["wall_s"] is None else f" in {summary['wall_s']:.0f} s"
    print(f"{summary['epochs']} epochs{time}; see {folder}/history.png")


def _make_table(summary: Row, history: list[Row]) -> Table:
    table = Table(title=f"{summary['experiment']}, seed {summary['seed']}: {summary['schedule']}")
    for column in ("", "start", "largest", "end, compacted"):
        table.add_column(column, justify="right" if column else "left")
    if history:
        first, largest = history[0], max(history, key=lambda row: row["params_dense"])
        for name in ("params", "params_dense", "macs"):
            table.add_row(name, f"{first[name]:,}", f"{largest[name]:,}", f"{summary[name]:,}")
    if "budget/target" in summary:
        target, actual = (f"{name} {summary[f'budget/{name}']:,}" for name in ("target", "actual"))
        table.add_row(f"budget ({summary['budget/by']})", "", target, actual)
    for row in summary.get("sets", []):
        table.add_row(f"macs, mean, set {row['set']}", "", "", f"{row['macs_dynamic']:,}")
        for name, text in list_shown(row):
            table.add_row(f"{name}, set {row['set']}", "", "", text)
    if not summary.get("sets"):
        for name, text in list_shown(summary):
            table.add_row(name, "", "", text)
    return table


def _make_level_table(rows: list[Row]) -> Table:
    table = Table(title="levels, each a part of the next")
    counts = [name for name in ("level", "params", "macs", "macs_dynamic") if name in rows[0]]
    for name in (*counts, *(name for name, _ in list_shown(rows[0]))):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{row[name]:,}" for name in counts), *(text for _, text in list_shown(row)))
    return table
