"""The end of a run: measured once on the test split, written down, shown."""

import copy
import functools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchvision
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from elastic.data import ImageData
from elastic.dynamic.loss import ActivationCost
from elastic.dynamic.modules import iterate_modules, select_set
from elastic.experiments.tools.per_image import run_per_image
from elastic.experiments.tools.setup import active
from elastic.files.atomic import write_atomically
from elastic.levels.nested import Levels
from elastic.measure import counts
from elastic.training.classifier import ElasticClassifier

# What changes the network, or what is kept of it, in the order in which `schedule` names it.
SCHEDULE = ("growth", "gates", "magnitude", "ema", "joint", "reconstruct", "dynamic")


def test_accuracy(net: nn.Module, data: ImageData) -> float:
    """On the official test split, in fp32, of a copy: laid out anew, a level would leave its network."""
    judge = ElasticClassifier(copy.deepcopy(net), data.shape, data.classes, torch.optim.SGD)
    trainer = L.Trainer(
        accelerator="auto", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    with torch.inference_mode():
        return float(trainer.test(judge, data, verbose=False)[0]["test/acc"])


def measure(plain: nn.Module, data: ImageData, switched: fx.GraphModule | None = None) -> dict[str, Any]:
    """What a compacted network is: accuracy on the test split, `params`, `params_dense` and `macs`.

    Args:
        switched: the same network with kernel activation modules: `test/acc` is then with the first set of
            them, `macs_dynamic` the mean over the test split, and all counts have the modules in them.
    """
    found: dict[str, Any] = {
        "params": counts.count_params(plain),
        "params_dense": counts.count_params_dense(plain),
        "levels": [],
        "sets": [],
    }
    if switched is None:
        macs = counts.count_macs(plain, torch.zeros(1, *data.shape))
        return {"test/acc": test_accuracy(plain, data), **found, "macs": macs, "macs_dynamic": macs}
    engaged, heads = ActivationCost(switched, torch.zeros(1, *data.shape)), list(iterate_modules(switched))
    for chosen in range(len(heads[0].heads)):
        select_set(switched, chosen)
        seen = run_per_image(switched, data)
        found["sets"].append({"set": chosen, "test/acc": seen.accuracy, "macs_dynamic": round(seen.macs)})
    select_set(switched, 0)
    for name, count in (("params", counts.count_params), ("params_dense", counts.count_params_dense)):
        found[name] += sum(count(module.heads[0]) for module in heads)
    first = {name: found["sets"][0][name] for name in ("test/acc", "macs_dynamic")}
    return {**found, **first, "macs": engaged.dense_macs + engaged.module_macs}


def measure_levels(
    levels: Levels, data: ImageData, switched: Sequence[fx.GraphModule] = ()
) -> list[dict[str, Any]]:
    """What each level is, the smallest first; the last one is the network itself."""
    shown = ("params", "macs", "test/acc", *(("macs_dynamic", "sets") if switched else ()))
    found = []
    for k, level in enumerate(levels):
        row = measure(level, data, switched[k] if switched else None)
        found.append({"level": k, **{name: row[name] for name in shown}})
    return found


def summarise(
    cfg: DictConfig, measured: dict[str, Any], wall_s: float, macs_training: int | None
) -> dict[str, Any]:
    """One flat object, under the keys that every run shares.

    Args:
        measured: what the network is, from `measure`.
        wall_s, macs_training: what training took, see `callbacks.Census`; None where it was not counted.
    """
    return {
        "experiment": cfg.name,
        "seed": cfg.seed,
        "data": cfg.choices.data,
        "model": cfg.choices.model,
        "schedule": "+".join(name for name in SCHEDULE if name in active(cfg)) or "static",
        "epochs": cfg.trainer.max_epochs,
        **measured,
        "macs_training": macs_training,
        "wall_s": round(wall_s, 1),
        "git": revision(),
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
    if "budget/target" in summary:
        target, actual = (f"{summary[f'budget/{name}']:,}" for name in ("target", "actual"))
        table.add_row(f"budget ({summary['budget/by']})", "", f"target {target}", f"actual {actual}")
    for each in summary.get("sets", []):
        table.add_row(f"macs, mean, set {each['set']}", "", "", f"{each['macs_dynamic']:,}")
        table.add_row(f"test accuracy, set {each['set']}", "", "", f"{each['test/acc']:.2%}")
    if not summary.get("sets"):
        table.add_row("test accuracy", "", "", f"{summary['test/acc']:.2%}")
    Console().print(table)
    if summary.get("levels"):
        Console().print(_levels(summary["levels"]))
    if "budget/reason" in summary:
        print(f"the budget was missed by more than 2 %: {summary['budget/reason']}")
    print(f"{summary['epochs']} epochs in {summary['wall_s']:.0f} s; see {folder}/history.png")


def _levels(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="levels, each a part of the next")
    columns = {"level": "d", "params": ",", "macs": ",", "macs_dynamic": ",", "test/acc": ".2%"}
    held = {name: form for name, form in columns.items() if name in rows[0]}
    for name in held:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{row[name]:{form}}" for name, form in held.items()))
    return table


def write_summary(summary: dict[str, Any], folder: Path) -> None:
    text = json.dumps(summary, indent=2) + "\n"
    write_atomically(folder / "summary.json", lambda part: part.write_text(text))


@functools.cache
def revision() -> str | None:
    """The commit of the code, as it is when first asked, with a mark where it has been changed since."""
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
