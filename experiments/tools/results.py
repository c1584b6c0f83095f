"""Make tables of arms: mean ± sd over seeds, in one unit and with the same digits in a column."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from elastic.errors import OptionError
from elastic.experiments.tools.arms import Arm
from elastic.experiments.tools.differences import Difference, compute_difference
from elastic.experiments.tools.metrics import describe_metric
from elastic.experiments.tools.tables import format_spread

NONE = "–"


@dataclass(frozen=True)
class Column:
    """Hold what a column shows of a summary.

    Attributes:
        key: of the summary.
        head: of the column; `{}` stands for a unit's prefix.
        scale: that values are multiplied by.
        digits: behind the point.
        more_is_better: or less.
    """

    key: str
    head: str
    scale: float = 1.0
    digits: int = 0
    more_is_better: bool = False


COLUMNS = (  # behind those of metrics
    Column("params", "params"),
    Column("params_dense", "params_dense"),
    Column("macs", "macs"),
    Column("macs_dynamic", "macs, mean"),  # where kernels are switched off
    Column("macs_training", "training {}MACs", digits=3),
    Column("latency_ms", "latency (ms)", digits=3),  # of all runs, or of none
    Column("wall_s", "wall (s)"),
)
PREFIXES = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
CSV_SCALES = {"macs_training": 1e-12}  # in files, whose units do not depend on the runs
LATEX = {sign: rf"\{sign}" for sign in "&%_#${}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    "\n": " ",
}


@dataclass(frozen=True)
class ResultTable:
    """Hold the arms on one data set, judged by one metric, as text.

    Attributes:
        data: the data set.
        title: the same, and the metric where others on it are judged by another.
        arms: a row each.
        head: of the columns.
        rows: of the table.
        best: row and column of the best mean of each column, as it is shown.
        baseline: what the last columns are about, the name or label of an arm; None, or no arm here, without.
    """

    data: str
    title: str
    arms: Sequence[Arm]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: set[tuple[int, int]]
    baseline: str | None = None


def make_tables(arms: Sequence[Arm], baseline: str | None = None) -> list[ResultTable]:
    """Make a table for each data set and metric, in the order of their names.

    Args:
        arms: all of them.
        baseline: the name or the label of the arm that each is compared with, seed by seed.

    Raises:
        OptionError: no arm has that name.
    """
    groups: dict[tuple[str, str], list[Arm]] = {}
    for arm in arms:
        groups.setdefault((arm.data, arm.metric), []).append(arm)
    counts = Counter(data for data, _ in groups)
    names = {
        key: f"{key[0]}, {describe_metric(key[1]).name}" if counts[key[0]] > 1 else key[0] for key in groups
    }
    if baseline is not None and find_arm(arms, baseline) is None:
        labels = ", ".join(sorted(arm.label for arm in arms))
        raise OptionError(f"there is no arm {baseline} to compare with: name one of {labels}")
    return [make_table(names[key], groups[key], baseline) for key in sorted(groups)]


def find_arm(arms: Sequence[Arm], name: str | None) -> Arm | None:
    """Find an arm by its name or label."""
    return next((arm for arm in arms if name in (arm.name, arm.label)), None)


def make_table(title: str, arms: Sequence[Arm], baseline: str | None = None) -> ResultTable:
    """Make a table of arms on the same data."""
    columns = [fit_column(column, arms) for column in select_columns(arms)]
    rows = [
        [arm.label, str(len(arm.runs)), *(format_mean(arm, column) for column in columns)] for arm in arms
    ]
    head, best = ["arm", "runs", *(column.head for column in columns)], find_best(rows, columns)
    other = find_arm(arms, baseline)
    if other is not None:
        head += [f"− {other.label} (95 %)", "p"]
        for row, arm in zip(rows, arms, strict=True):
            row += format_difference(compute_difference(arm, other), columns[0])
    return ResultTable(arms[0].data, title, arms, head, rows, best, baseline)


def select_columns(arms: Sequence[Arm]) -> list[Column]:
    """Select the columns that say something of these arms."""
    optional = {"latency_ms": any(arm.list_values("latency_ms") for arm in arms), "macs_dynamic": skips(arms)}
    metrics = [make_metric_column(key) for key in dict.fromkeys(arm.metric for arm in arms)]
    return [*metrics, *(column for column in COLUMNS if optional.get(column.key, True))]


def make_metric_column(key: str) -> Column:
    """Make the column of a metric."""
    shown = describe_metric(key)
    return Column(key, shown.head, shown.scale, shown.digits, more_is_better=True)


def skips(arms: Sequence[Arm]) -> bool:
    """Tell whether a network has kernels that are switched off."""
    runs = (run for arm in arms for run in arm.runs)
    return any(run.get("macs_dynamic", run.get("macs")) != run.get("macs") for run in runs)


def fit_column(column: Column, arms: Sequence[Arm]) -> Column:
    """Choose a column's unit by its largest mean, or a smaller one where its smallest would be shown as zero.

    Where a column has no choice of units, it gets as many digits as its smallest mean needs.
    """
    means = [mean[0] for arm in arms if (mean := arm.compute_mean(column.key)) is not None and mean[0] > 0]
    if not means:
        return replace(column, head=column.head.format("T"))
    if "{}" in column.head:
        maximum = min(max(means), min(means) / (0.5 * 0.1**column.digits))
        prefix, unit = next(((p, u) for p, u in PREFIXES.items() if maximum >= u), ("", 1.0))
        column = replace(column, head=column.head.format(prefix), scale=1 / unit)
    smallest = column.scale * min(means)
    if smallest < 0.5 * 0.1**column.digits:  # it would be shown as zero: two digits of it, then, for all
        return replace(column, digits=1 - math.floor(math.log10(smallest)))
    return column


def format_mean(arm: Arm, column: Column) -> str:
    """Write mean ± sd, or what the only run has."""
    values = [column.scale * value for value in arm.list_values(column.key)]
    return format_spread(values, column.digits) if values else NONE


def format_difference(difference: Difference | None, column: Column) -> list[str]:
    """Write a difference with its confidence interval, and p; a single pair of seeds has neither."""
    if difference is None:
        return [NONE, NONE]
    mean = f"{column.scale * difference.mean:+.{column.digits}f}"
    if difference.margin is None or difference.p is None:
        return [mean, NONE]
    return [f"{mean} ± {column.scale * difference.margin:.{column.digits}f}", f"{difference.p:.2g}"]


def find_best(rows: Sequence[Sequence[str]], columns: Sequence[Column]) -> set[tuple[int, int]]:
    """Find the cells with the best mean of each column as shown."""
    best = set()
    for j, column in enumerate(columns, start=2):  # behind the arm and the count of its runs
        texts = {i: row[j].partition(" ")[0].replace(",", "") for i, row in enumerate(rows)}
        means = {i: float(text) for i, text in texts.items() if text not in (NONE, "nan")}
        target = (max if column.more_is_better else min)(means.values(), default=None)
        best |= {(i, j) for i, mean in means.items() if mean == target}
    return best


def list_csv(arms: Sequence[Arm], baseline: str | None = None) -> tuple[list[str], list[list[str]]]:
    """List head and rows of a file: means and sd apart, in units that do not depend on the arms."""
    columns, is_mixed = select_columns(arms), len({arm.data for arm in arms}) > 1
    head = [*(["data"] if is_mixed else []), "arm", "runs"]
    head += [*(f"{column.key} {part}" for column in columns for part in ("mean", "sd"))]
    if baseline is not None:
        head += [f"− {baseline} {part}" for part in ("pairs", "mean", "95 %", "p")]
    rows = []
    for arm in sorted(arms, key=lambda arm: arm.name):
        values: list[str] = []
        for column in columns:
            scale = column.scale if column.more_is_better else CSV_SCALES.get(column.key, 1.0)
            mean = arm.compute_mean(column.key)
            values += ["", ""] if mean is None else [f"{scale * value:.6g}" for value in mean]
        if baseline is not None:
            alike = [other for other in arms if (other.data, other.metric) == (arm.data, arm.metric)]
            values += list_difference(arm, find_arm(alike, baseline))
        rows.append([*([arm.data] if is_mixed else []), arm.name, str(len(arm.runs)), *values])
    return head, rows


def list_difference(arm: Arm, baseline: Arm | None) -> list[str]:
    """List the cells of a file that say how an arm differs from the baseline; empty ones without a pair."""
    difference = None if baseline is None else compute_difference(arm, baseline)
    if difference is None:
        return [""] * 4
    scale = make_metric_column(arm.metric).scale
    values = (difference.mean, difference.margin)
    cells = ["" if value is None else f"{scale * value:.6g}" for value in values]
    return [str(difference.pairs), *cells, "" if difference.p is None else f"{difference.p:.3g}"]


def write_latex(table: ResultTable) -> str:
    """Write a table in LaTeX, for the package booktabs; the best of each column is bold."""

    def write_cell(text: str, bold: bool) -> str:
        escaped = re.sub("|".join(map(re.escape, LATEX)), lambda match: LATEX[match[0]], text)
        return rf"\textbf{{{escaped}}}" if bold else escaped

    lines = [
        " & ".join(write_cell(text, (i, j) in table.best) for j, text in enumerate(row)) + r" \\"
        for i, row in enumerate(table.rows)
    ]
    head = " & ".join(write_cell(text, False) for text in table.head) + r" \\"
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}"
    return "\n".join([begin, r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"])


def list_facts(arms: Sequence[Arm]) -> Mapping[str, str]:
    """List what runs have in common or differ in: code, hardware, seeds and budgets."""
    runs = [run for arm in arms for run in arm.runs]

    def list_distinct(key: str) -> str:
        values = [run[key] for run in runs if run.get(key) is not None]
        are_numbers = all(isinstance(value, int | float) for value in values)
        values = sorted(values, key=None if are_numbers else str)
        return ", ".join(
            dict.fromkeys(f"{value:,}" if type(value) is int else str(value) for value in values)
        )

    names = {
        "Commit": "git",
        "Hardware": "device",
        "torch": "torch",
        "Seeds": "seed",
        "Budget": "budget/target",
    }
    facts = {name: list_distinct(key) for name, key in names.items()}
    return {name: text for name, text in facts.items() if text}
