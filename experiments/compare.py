"""One table of many runs, mean ± sd over seeds: `python -m experiments.compare runs='<glob>'`.

`csv=<file>` writes it down, `figure=<file.png>` draws it, `html=<file>` makes a page of it, with more
figures, that opens anywhere.

A run is a folder with a `summary.json`; folders named <arm>-seed<k> are one arm. Runs that failed are listed.
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

from elastic.checkpoint import replace_file
from elastic.module import TrainingError
from experiments.figure import draw_arms
from experiments.page import against, by_level, failures, over_time, page, picture
from experiments.setup import run
from experiments.sweep import FAILED

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
            arm = _arm(folder)
            summary = _summary(folder / "summary.json")
            arms[arm].append(summary)
            for level in summary.get("levels", [])[:-1]:  # the last one is the network itself
                arms[f"{arm} level {level['level']}"].append(level)
    if not arms:
        raise TrainingError(f"no summary.json under {pattern}: name finished runs, say runs='outputs/*/*'")
    return dict(arms)


def failed(pattern: str) -> dict[str, str]:
    """Why runs of a sweep failed, by folder."""
    notes = (Path(found, FAILED) for found in sorted(glob.glob(pattern)))
    return {note.parent.name: json.loads(note.read_text())["error"] for note in notes if note.exists()}


def histories(pattern: str) -> dict[str, list[list[dict[str, Any]]]]:
    """What the census found in each epoch of each run that kept it, by arm."""
    found: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for folder in sorted(Path(name) for name in glob.glob(pattern)):
        if (folder / "history.jsonl").exists():
            lines = (folder / "history.jsonl").read_text().splitlines()
            found[_arm(folder)].append([json.loads(line) for line in lines])
    return found


def _arm(folder: Path) -> str:
    return re.sub(r"-seed\d+$", "", folder.name)


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
    if "runs" not in given or set(given) - {"runs", "csv", "figure", "html"}:
        raise TrainingError(
            "usage: python -m experiments.compare runs='<glob of run folders>' [csv=<file>] [figure=<png>] "
            "[html=<file>]"
        )
    found = read(str(given.runs))
    arms = {arm: (len(summaries), row(summaries)) for arm, summaries in found.items()}
    head = ("arm", "runs", *(head for head, _, _ in COLUMNS.values()))
    table, rows = Table(*head), []
    for arm, (count, cells) in sorted(arms.items(), key=lambda item: item[1][1]["params"] or ()):
        rows.append([arm, str(count), *(_shown(cells[key], d) for key, (_, _, d) in COLUMNS.items())])
        table.add_row(*rows[-1])
    Console(width=WIDTH).print(table)
    broken = failed(str(given.runs))
    for name, why in broken.items():
        print(f"failed: {name}: {why}")
    if "csv" in given:
        with open(str(given.csv), "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["arm", "runs", *(f"{c} {part}" for c in COLUMNS for part in ("mean", "sd"))])
            for arm, (count, cells) in sorted(arms.items()):
                written = ("" if v is None else f"{v:.6g}" for cell in cells.values() for v in cell or NONE)
                writer.writerow([arm, count, *written])
    if "figure" in given:
        draw_arms(found, Path(str(given.figure)))
    if "html" in given:
        best = max(range(len(rows)), key=lambda i: (arms[rows[i][0]][1]["test/acc"] or (0.0,))[0])
        text = page(str(given.runs), head, rows, best, [*figures(found, str(given.runs)), failures(broken)])
        replace_file(Path(str(given.html)), lambda part: part.write_text(text))


def figures(arms: dict[str, list[dict[str, Any]]], pattern: str) -> list[str]:
    """The figures of the page, as HTML."""
    edge = "The grey line joins what no other arm beats in both."
    past = histories(pattern)
    return [
        picture("Accuracy against size", edge, against(arms, "params", "parameters that are not zero")),
        picture("Accuracy against work", edge, against(arms, "macs_dynamic", "MACs an image, mean")),
        picture("Accuracy against training", edge, against(arms, "macs_training", "MACs of the training")),
        picture("Levels and sets", "Of one network each, chosen at run time.", by_level(arms)),
        picture("Size over time", "A line a run.", over_time(past, "params", "parameters that are not zero")),
        picture(
            "Allocated over time", "A line a run.", over_time(past, "params_dense", "parameters allocated")
        ),
    ]


def _shown(cell: Cell, digits: int) -> str:
    return "–" if cell is None else " ± ".join(f"{value:,.{digits}f}" for value in cell)


if __name__ == "__main__":
    run(main)
