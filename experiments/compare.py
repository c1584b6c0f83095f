"""One table of many runs, mean ± sd over seeds: `python -m experiments.compare runs='<glob>'`.

`csv=<file>` writes it down, `figure=<file.png>` draws it.

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
from experiments.figure import draw_arms
from experiments.setup import run

# By key of the summary: the head of the column, what the value is multiplied by, and its digits in the table.
COLUMNS = {
    "test/acc": ("test acc (%)", 100.0, 2),
    "params": ("params", 1.0, 0),
    "params_dense": ("params_dense", 1.0, 0),
    "macs": ("macs", 1.0, 0),
    "macs_training": ("training TMACs", 1e-12, 3),
    "wall_s": ("wall (s)", 1.0, 0),
}
WIDTH = 132  # characters of the table
NONE = (None, None)
Cell = tuple[float, float] | None


def read(pattern: str) -> dict[str, list[dict[str, Any]]]:
    """The summaries of all runs that match, by arm."""
    arms: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for folder in sorted(Path(found) for found in glob.glob(pattern)):
        if (folder / "summary.json").exists():
            arm = re.sub(r"-seed\d+$", "", folder.name)
            summary = _summary(folder / "summary.json")
            arms[arm].append(summary)
            for level in summary.get("levels", [])[:-1]:  # the last one is the network itself
                arms[f"{arm} level {level['level']}"].append(level)
    if not arms:
        raise TrainingError(f"no summary.json under {pattern}: name finished runs, say runs='outputs/*/*'")
    return dict(arms)


def _summary(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        float(found["test/acc"])  # without it there is nothing to compare
        row([found])  # and the rest are numbers, too
        return found
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(f"{path} is damaged: finish its run again, or leave it out of runs") from error


def row(summaries: Sequence[dict[str, Any]]) -> dict[str, Cell]:
    """Mean and sample standard deviation of each column, 0 for a single run; None where a run lacks it."""
    found: dict[str, Cell] = {}
    for column, (_, scale, _) in COLUMNS.items():
        values = [scale * summary[column] for summary in summaries if summary.get(column) is not None]
        found[column] = None
        if len(values) == len(summaries):
            found[column] = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def main() -> None:
    given = OmegaConf.from_dotlist(sys.argv[1:])
    if "runs" not in given or set(given) - {"runs", "csv", "figure"}:
        raise TrainingError(
            "usage: python -m experiments.compare runs='<glob of run folders>' [csv=<file>] [figure=<png>]"
        )
    found = read(str(given.runs))
    arms = {arm: (len(summaries), row(summaries)) for arm, summaries in found.items()}
    table = Table("arm", "runs", *(head for head, _, _ in COLUMNS.values()))
    for arm, (count, cells) in sorted(arms.items(), key=lambda item: item[1][1]["params"] or ()):
        table.add_row(arm, str(count), *(_shown(cells[key], d) for key, (_, _, d) in COLUMNS.items()))
    Console(width=WIDTH).print(table)
    if "csv" in given:
        with open(str(given.csv), "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["arm", "runs", *(f"{c} {part}" for c in COLUMNS for part in ("mean", "sd"))])
            for arm, (count, cells) in sorted(arms.items()):
                written = ("" if v is None else f"{v:.6g}" for cell in cells.values() for v in cell or NONE)
                writer.writerow([arm, count, *written])
    if "figure" in given:
        draw_arms(found, Path(str(given.figure)))


def _shown(cell: Cell, digits: int) -> str:
    return "–" if cell is None else " ± ".join(f"{value:,.{digits}f}" for value in cell)


if __name__ == "__main__":
    run(main)
