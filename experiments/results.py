"""Write the README's table of results from recorded runs: `python -m experiments.results`.

A row names recorded runs by their folder and says in words what they are of; every number comes from their
`summary.json`, or from what `elastic cascade` has measured. The table stands between two marks in README.md.
"""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.errors import FileError
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.tables import format_markdown, format_spread, replace_table
from elastic.files.atomic import write_atomically

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: made by `python -m experiments.results` -->", "<!-- end of results -->"
HEAD = ("method", "task", "test accuracy", "dense network", "parameters", "MACs", "seeds")


@dataclass(frozen=True)
class Row:
    """Declare one row of the table.

    Args:
        method: names the page in `docs/` that tells of it.
        question, arm: the recorded runs, `experiments/<question>/<arm>-seed*`.
        task: data and network, in words.
        dense: runs of the same network without the method, `<question>/<arm>`, where such runs are recorded.
        is_cascade: whether the levels answer as a cascade, at the budget of the question's `cascade.csv`.
    """

    method: str
    question: str
    arm: str
    task: str
    dense: str | None = None
    is_cascade: bool = False


RESNET_DENSE = "prune_and_grow/resnet20-dense_100"
ROWS = (
    Row("growth", "first_runs", "gnap", "digits, the demo", "first_runs/dense"),
    Row("growth", "gnap_mnist", "p5000", "MNIST, CNN that starts with 979 parameters"),
    Row("growth", "gnap_cifar10", "p157800", "CIFAR-10, ResNet-20"),
    Row("growth", "growth_pays", "fixed_resolution", "CIFAR-10, ResNet-20: images grow", "growth_pays/fixed"),
    Row("levels", "prune_and_grow", "resnet20-joint_100", "CIFAR-10, ResNet-20, 4 levels", RESNET_DENSE),
    Row(
        *("levels", "dynamic_pruning", "resnet20-cascade_taught_100"),
        *("CIFAR-10, ResNet-20, cascade of 2 levels", RESNET_DENSE, True),
    ),
    Row("dynamic", "dynamic_pruning", "resnet20-looking_hard_100", "CIFAR-10, ResNet-20", RESNET_DENSE),
    Row("dynamic", "composition_mnist", "gated", "MNIST: grown, pruned, 3 levels"),
)


def make_table(rows: Sequence[Row], root: Path = ROOT) -> str:
    """Make the table in Markdown.

    Raises:
        FileError: a row's runs are not there, or damaged.
    """
    return format_markdown(HEAD, [_make_cells(row, root / "experiments") for row in rows])


def read_summaries(folder: Path, arm: str) -> list[dict[str, Any]]:
    """Read the summaries of all seeds of an arm.

    Raises:
        FileError: there is none, or one is damaged.
    """
    paths = sorted(folder.glob(f"{arm}-seed*/summary.json"))
    if not paths:
        raise FileError(f"{folder} has no run {arm}-seed…: record one, or take its row out of the table")
    try:
        return [json.loads(path.read_text()) for path in paths]
    except ValueError as error:
        raise FileError(f"a summary.json of {folder / arm} is damaged: restore it") from error


def _make_cells(row: Row, folder: Path) -> tuple[str, ...]:
    summaries = read_summaries(folder / row.question, row.arm)
    dense = "–"
    if row.dense is not None:
        question, _, arm = row.dense.partition("/")
        dense = _show_accuracy(read_summaries(folder / question, arm))
    if row.is_cascade:
        accuracy, params, macs = _read_cascade(folder / row.question, row.arm, summaries)
    else:
        accuracy, params, macs = (show(summaries) for show in (_show_accuracy, _show_params, _show_macs))
    return (
        f"[{row.method}](docs/{row.method}.md)",
        row.task,
        accuracy,
        dense,
        params,
        macs,
        f"[{len(summaries)}](experiments/{row.question}/README.md)",
    )


def _read_cascade(folder: Path, arm: str, summaries: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Read an arm's accuracy as a cascade, the network's parameters, and the MACs of both.

    Raises:
        FileError: the table has no such arm.
    """
    path = folder / "cascade.csv"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []
    row = next(
        (row for row in rows if row["arm"] == f"{folder.name}/{arm}"), None
    )  # the first is the budget's
    if row is None or int(row["runs"]) != len(summaries):
        raise FileError(f"{path} has no row of the runs {arm}-seed…: measure them by `elastic cascade`")
    spent = float(row["MACs, mean"].partition(" ")[0].replace(",", ""))
    params, macs = (statistics.fmean(float(s[key]) for s in summaries) for key in ("params", "macs"))
    return f"{row['test acc (%)']} %", f"{params:,.0f}", f"{_shorten(spent)} of {_shorten(macs)}"


def _get_levels(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what the summary says of each level, or of the network alone."""
    return summary.get("levels") or [summary]


def _list_ends(summaries: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """List a number of all seeds: of the smallest level and the largest, or of the network alone."""
    levels = [_get_levels(summary) for summary in summaries]
    ends = sorted({0, len(levels[0]) - 1})
    return [[float(rows[k].get(key, rows[k]["macs"])) for rows in levels] for k in ends]


def _show_accuracy(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Show mean ± sd over seeds in percent."""
    ends = _list_ends(summaries, "test/acc")
    return " to ".join(format_spread([100 * value for value in values]) for values in ends) + " %"


def _show_params(summaries: Sequence[Mapping[str, Any]]) -> str:
    return " to ".join(f"{statistics.fmean(values):,.0f}" for values in _list_ends(summaries, "params"))


def _show_macs(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Show what an input takes; where kernels are switched off, the mean, and what all kernels would take."""
    active, dense = (
        [statistics.fmean(values) for values in _list_ends(summaries, key)]
        for key in ("macs_dynamic", "macs")
    )
    text = " to ".join(map(_shorten, active))
    return text if active == dense else f"{text} of {' to '.join(map(_shorten, dense))}"


def _shorten(count: float) -> str:
    """Write a count in three digits: 2.4M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def main() -> None:
    """Print the table, and put it into README.md."""
    table, readme = make_table(ROWS), ROOT / "README.md"
    text = replace_table(readme.read_text(), table, BEGIN, END)
    write_atomically(readme, lambda part: part.write_text(text))
    print(table)


if __name__ == "__main__":
    run(main)
