"""One table of many runs, mean ± sd over seeds: `python -m experiments.compare runs='<glob>' [csv=<file>]`.

A run is a folder with a `summary.json`; folders named <arm>-seed<k> are one arm.
"""

import csv
import glob
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from elastic.module import TrainingError
from experiments.setup import run

COLUMNS = {"test/acc": 100.0, "params": 1.0, "params_dense": 1.0, "macs": 1.0, "wall_s": 1.0}


def read(pattern: str) -> dict[str, list[dict[str, Any]]]:
    """The summaries of all runs that match, by arm."""
    arms: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for folder in sorted(Path(found) for found in glob.glob(pattern)):
        if (folder / "summary.json").exists():
            arm = re.sub(r"-seed\d+$", "", folder.name)
            arms[arm].append(json.loads((folder / "summary.json").read_text()))
    if not arms:
        raise TrainingError(f"no summary.json under {pattern}: name finished runs, say runs='outputs/*/*'")
    return dict(arms)


def row(summaries: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation of each column; 0 for a single run."""
    found = {}
    for column, scale in COLUMNS.items():
        values = [scale * summary[column] for summary in summaries]
        found[column] = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def main() -> None:
    given = OmegaConf.from_dotlist(sys.argv[1:])
    if "runs" not in given or set(given) - {"runs", "csv"}:
        raise TrainingError("usage: python -m experiments.compare runs='<glob of run folders>' [csv=<file>]")
    arms = {arm: (len(summaries), row(summaries)) for arm, summaries in read(str(given.runs)).items()}
    table = Table("arm", "runs", "test acc (%)", "params", "params_dense", "macs", "wall (s)")
    for arm, (count, cells) in sorted(arms.items(), key=lambda item: item[1][1]["params"][0]):
        digits = (2, 0, 0, 0, 0)
        shown = [f"{m:,.{d}f} ± {s:,.{d}f}" for (m, s), d in zip(cells.values(), digits, strict=True)]
        table.add_row(arm, str(count), *shown)
    Console(width=110).print(table)
    if "csv" in given:
        with open(str(given.csv), "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["arm", "runs", *(f"{c} {part}" for c in COLUMNS for part in ("mean", "sd"))])
            for arm, (count, cells) in sorted(arms.items()):
                writer.writerow([arm, count, *(f"{value:.6g}" for cell in cells.values() for value in cell)])


if __name__ == "__main__":
    run(main)
