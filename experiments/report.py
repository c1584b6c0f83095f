"""The end of a run: measured once on the test split, written down, shown."""

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchvision
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from elastic import cost
from elastic.checkpoint import replace_file
from elastic.data import ImageData
from elastic.module import ElasticModule
from elastic.nested import Levels
from experiments.setup import active

# What changes the network, or what is kept of it, in the order in which `schedule` names it.
SCHEDULE = ("grow", "prune", "magnitude", "average", "levels")


def test_accuracy(net: nn.Module, data: ImageData) -> float:
    """On the official test split, in fp32, of a copy: laid out anew, a level would leave its network."""
    judge = ElasticModule(copy.deepcopy(net), data.shape, data.classes, torch.optim.SGD)
    trainer = L.Trainer(
        accelerator="auto", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    with torch.inference_mode():
        return float(trainer.test(judge, data, verbose=False)[0]["test/acc"])


def measure(plain: nn.Module, data: ImageData) -> dict[str, Any]:
    """What a compacted network is: accuracy on the test split, `params`, `params_dense` and `macs`."""
    macs = cost.macs(plain, torch.zeros(1, *data.shape))
    return {
        "test/acc": test_accuracy(plain, data),
        "params": cost.params(plain),
        "params_dense": cost.params_dense(plain),
        "macs": macs,
        "macs_dynamic": macs,
        "levels": [],
    }


def measure_levels(levels: Levels, data: ImageData) -> list[dict[str, Any]]:
    """What each level is, the smallest first; the last one is the network itself."""
    shown = ("params", "macs", "test/acc")
    found = []
    for k, level in enumerate(levels):
        row = measure(level, data)
        found.append({"level": k, **{name: row[name] for name in shown}})
    return found


def summarise(
    cfg: DictConfig, plain: nn.Module, data: ImageData, wall_s: float, macs_training: int | None
) -> dict[str, Any]:
    """One flat object, under the keys that every run shares.

    Args:
        plain: the compacted network.
        wall_s, macs_training: what training took, see `callbacks.Census`; None where it was not counted.
    """
    return {
        "experiment": cfg.name,
        "seed": cfg.seed,
        "data": cfg.choices.data,
        "model": cfg.choices.model,
        "schedule": "+".join(name for name in SCHEDULE if name in active(cfg)) or "static",
        "epochs": cfg.trainer.max_epochs,
        **measure(plain, data),
        "macs_training": macs_training,
        "wall_s": round(wall_s, 1),
        "git": _git(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "lightning": L.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
    }


def show(summary: dict[str, Any], history: list[dict[str, Any]], folder: Path) -> None:
    """The table at the end of a run."""
    table = Table(title=f"{summary['experiment']}, seed {summary['seed']}: {summary['schedule']}")
    for column in ("", "start", "largest", "end, compacted"):
        table.add_column(column, justify="right" if column else "left")
    if history:
        first, most = history[0], max(history, key=lambda row: row["params_dense"])
        for name in ("params", "params_dense", "macs"):
            table.add_row(name, f"{first[name]:,}", f"{most[name]:,}", f"{summary[name]:,}")
    if "budget/asked" in summary:
        asked, got = (f"{summary[f'budget/{name}']:,}" for name in ("asked", "got"))
        table.add_row(f"budget ({summary['budget/aim']})", "", f"asked {asked}", f"got {got}")
    table.add_row("test accuracy", "", "", f"{summary['test/acc']:.2%}")
    Console().print(table)
    if summary.get("levels"):
        Console().print(_levels(summary["levels"]))
    if "budget/why" in summary:
        print(f"the budget was missed by more than 2 %: {summary['budget/why']}")
    print(f"{summary['epochs']} epochs in {summary['wall_s']:.0f} s; see {folder}/history.png")


def _levels(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="levels, each a part of the next")
    for column in ("level", "params", "macs", "test accuracy"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["level"]), f"{row['params']:,}", f"{row['macs']:,}", f"{row['test/acc']:.2%}")
    return table


def write_summary(summary: dict[str, Any], folder: Path) -> None:
    text = json.dumps(summary, indent=2) + "\n"
    replace_file(folder / "summary.json", lambda part: part.write_text(text))


def _git() -> str | None:
    """The commit of the code, with a mark where it has been changed since."""
    here = Path(__file__).parent
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return f"{names[0]}, {torch.get_num_threads()} threads" if names else "CPU"
