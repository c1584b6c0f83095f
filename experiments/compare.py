"""One table of many runs, mean ± sd over seeds: `python -m experiments.compare runs='<glob>'`.

`csv=<file>` writes it down, `figure=<file.png>` draws it, `html=<file>` makes a page of it, with more
figures, that opens anywhere. `latency=true` measures all networks, and their levels, on this machine.

A run is a folder with a `summary.json`; folders named <arm>-seed<k> beside each other are one arm. Runs that
failed are listed.
"""

import glob
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from csv import writer as write_rows
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Column, Table

from elastic.errors import TrainingError
from elastic.experiments.tools.charts import Arm, against, by_level, height, over_time, short
from elastic.experiments.tools.figure import draw_arms
from elastic.experiments.tools.html import failures, page, picture
from elastic.experiments.tools.setup import quiet, run
from elastic.experiments.tools.sweep import FAILED
from elastic.experiments.tools.timing import time_runs
from elastic.files.atomic import write_atomically

# By key of the summary: the head of the column, what the value is multiplied by, and its digits in the table.
COLUMNS = {
    "test/acc": ("test acc (%)", 100.0, 2),
    "params": ("params", 1.0, 0),
    "params_dense": ("params_dense", 1.0, 0),
    "macs": ("macs", 1.0, 0),
    "macs_dynamic": ("macs, mean", 1.0, 0),  # where kernels are switched off
    "macs_training": ("training TMACs", 1e-12, 3),
    "latency_ms": ("latency (ms)", 1.0, 3),  # of all runs, or of none
    "wall_s": ("wall (s)", 1.0, 0),
}
WIDTH = 132  # characters of the table
NONE = (None, None)
Cell = tuple[float, float] | None


def named(pattern: str) -> dict[Path, str]:
    """The folders that match, and the arm of each: its name without the seed.

    Where they lie in several folders, with that folder's: the same name may be of different questions.
    """
    folders = sorted(Path(found) for found in glob.glob(pattern))
    several = len({folder.parent for folder in folders}) > 1
    names = {folder: re.sub(r"-seed\d+$", "", folder.name) for folder in folders}
    return {folder: f"{folder.parent.name}/{arm}" if several else arm for folder, arm in names.items()}


def read(pattern: str) -> dict[Path, dict[str, Any]]:
    """The summaries of all runs that match, by folder."""
    files = {folder: folder / "summary.json" for folder in named(pattern)}
    found = {folder: _summary(file) for folder, file in files.items() if file.exists()}
    if not found:
        raise TrainingError(f"no summary.json under {pattern}: name finished runs, say runs='outputs/*/*'")
    return found


def by_arm(
    found: Mapping[Path, dict[str, Any]], names: Mapping[Path, str]
) -> dict[str, list[dict[str, Any]]]:
    """The summaries of each arm; its levels and sets of modules as arms of their own, the smallest first."""
    arms: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for folder, summary in found.items():
        arms[names[folder]].append(summary)
        for level in summary.get("levels", [])[:-1]:  # the last one is the network itself
            arms[f"{names[folder]} level {level['level']}"].append(level)
        for one in summary.get("sets", [])[1:]:  # the first one is what the summary is of
            rest = {key: value for key, value in summary.items() if key not in ("levels", "sets")}
            arms[f"{names[folder]} set {one['set']}"].append(rest | one)
    return dict(sorted(arms.items(), key=lambda item: row(item[1])["params"] or ()))


def switched(found: Mapping[str, Sequence[dict[str, Any]]]) -> bool:
    """Whether a network has kernels that are switched off."""
    runs = (run for runs in found.values() for run in runs)
    return any(run.get("macs_dynamic", run.get("macs")) != run.get("macs") for run in runs)


def failed(pattern: str) -> dict[str, str]:
    """Why runs of a sweep failed, by folder."""
    notes = (folder / FAILED for folder in named(pattern))
    return {note.parent.name: json.loads(note.read_text())["error"] for note in notes if note.exists()}


def histories(pattern: str) -> dict[str, list[list[dict[str, Any]]]]:
    """What the census found in each epoch of each run that kept it, by arm."""
    found: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for folder, arm in named(pattern).items():
        if (folder / "history.jsonl").exists():
            lines = (folder / "history.jsonl").read_text().splitlines()
            found[arm].append([json.loads(line) for line in lines])
    return found


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


def compare_runs(
    runs: str,
    csv: Path | None = None,
    figure: Path | None = None,
    html: Path | None = None,
    latency: bool = False,
) -> None:
    """Show one table of many runs, and write it down where a file is named.

    Args:
        runs: a glob of their folders.
        csv: the table as a file.
        figure: a picture of it.
        html: a page about it that opens anywhere, with more figures.
        latency: measure all networks, and their levels, on this machine.
    """
    summaries = read(runs)
    notes = []
    if latency:
        quiet()
        notes.append(time_runs(summaries))
    found = by_arm(summaries, named(runs))
    skips = switched(found)
    shown = {"latency_ms": bool(notes), "macs_dynamic": skips}
    columns = {key: column for key, column in COLUMNS.items() if shown.get(key, True)}
    cells = {arm: row(seeds) for arm, seeds in found.items()}
    head = ("arm", "runs", *(head for head, _, _ in columns.values()))
    table, rows = Table(Column("arm", overflow="fold"), *head[1:]), []
    for arm, seeds in found.items():
        texts = (_shown(cells[arm][key], len(seeds), digits) for key, (_, _, digits) in columns.items())
        rows.append([arm, str(len(seeds)), *texts])
        table.add_row(*rows[-1])
    Console(width=WIDTH).print(table)
    broken = failed(runs)
    for line in (*notes, *(f"failed: {name}: {why}" for name, why in broken.items())):
        print(line)
    if csv is not None:
        write_csv(found, cells, columns, csv)
    if figure is not None:
        draw_arms(found, "macs_dynamic" if skips else "params", figure)
    if html is not None:
        parts = [*figures(found, histories(runs), notes), failures(broken)]
        text = page(runs, head, rows, best(rows), parts)
        write_atomically(html, lambda part: part.write_text(text))


def write_csv(
    found: Mapping[str, Sequence[Any]],
    cells: Mapping[str, Mapping[str, Cell]],
    columns: Iterable[str],
    path: Path,
) -> None:
    with path.open("w", newline="") as file:
        writer = write_rows(file, lineterminator="\n")
        writer.writerow(["arm", "runs", *(f"{key} {part}" for key in columns for part in ("mean", "sd"))])
        for arm, runs in sorted(found.items()):
            values = (value for key in columns for value in cells[arm][key] or NONE)
            written = ("" if value is None else f"{value:.6g}" for value in values)
            writer.writerow([arm, len(runs), *written])


def best(rows: Sequence[Sequence[str]]) -> set[tuple[int, int]]:
    """Row and column of the best mean of each column as it is shown: accuracy is good, all else costs."""
    found = set()
    for column in range(2, len(rows[0])):
        shown = {i: row[column].partition(" ")[0].replace(",", "") for i, row in enumerate(rows)}
        means = {i: float(text) for i, text in shown.items() if text != "–"}
        wanted = (max if column == 2 else min)(means.values(), default=None)
        found |= {(i, column) for i, mean in means.items() if mean == wanted}
    return found


def figures(
    found: Mapping[str, list[dict[str, Any]]],
    past: Mapping[str, list[list[dict[str, Any]]]],
    notes: Sequence[str],
) -> list[str]:
    """The figures of the page, as HTML."""
    arms = [
        Arm(f"{i + 1} {short(arm)}", f"C{i % 10}", runs, past.get(arm, ()))
        for i, (arm, runs) in enumerate(found.items())
    ]
    edge, tall = "The grey line joins what no other arm beats in both.", height(len(arms))
    drawn = {
        "Accuracy against size": (edge, against(arms, "params", "parameters that are not zero")),
        "Accuracy against work": (edge, against(arms, "macs_dynamic", "MACs an image, mean")),
        "Accuracy against latency": (" ".join((edge, *notes)), against(arms, "latency_ms", "ms an image")),
        "Accuracy against training": (edge, against(arms, "macs_training", "MACs of the training")),
        "Levels and sets": (
            "Of one network each, chosen at run time.",
            by_level(arms, ("macs_dynamic", "macs"), "10⁶ MACs an image, mean", 1e-6),
        ),
        "Levels and sets by latency": (" ".join(notes), by_level(arms, ("latency_ms",), "ms an image")),
        "Size over time": ("A line a run.", over_time(arms, "params", "parameters that are not zero")),
        "Allocated over time": ("A line a run.", over_time(arms, "params_dense", "parameters allocated")),
    }
    return [picture(title, caption, draw, tall) for title, (caption, draw) in drawn.items()]


def _shown(cell: Cell, runs: int, digits: int) -> str:
    """Mean ± sd, or what the only run has; with two digits where the usual ones are all zero."""
    if cell is None:
        return "–"
    form = ".2g" if 0 < abs(cell[0]) < 0.5 * 0.1**digits else f",.{digits}f"
    return " ± ".join(f"{value:{form}}" for value in cell[: min(runs, 2)])


def main() -> None:
    given = OmegaConf.from_dotlist(sys.argv[1:])
    if "runs" not in given or set(given) - {"runs", "csv", "figure", "html", "latency"}:
        raise TrainingError(
            "usage: python -m experiments.compare runs='<glob of run folders>' [csv=<file>] [figure=<png>] "
            "[html=<file>] [latency=true]"
        )
    files = {name: Path(str(given[name])) for name in ("csv", "figure", "html") if name in given}
    compare_runs(str(given.runs), **files, latency=bool(given.get("latency")))


if __name__ == "__main__":
    run(main)
