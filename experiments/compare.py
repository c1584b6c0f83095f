"""Show one table of many runs, mean ± sd over seeds: `python -m experiments.compare runs='<glob>'`.

`csv=<file>` writes it down, `figure=<file.png>` draws it, `html=<file>` makes a page with more figures that
opens anywhere. `markdown=<file>` puts it into a text, between <!-- begin of `elastic compare` --> and
<!-- end of `elastic compare` -->; of several tables in a text, each has marks that name its runs:
`elastic compare runs=<glob>`. `latency=true` measures all networks, and their levels, on this machine.
`baseline=<arm>` compares each arm with that one, seed by seed: the mean difference with its 95 % confidence
interval, and p of a paired t test. Each data set, and each metric, has a table of its own.

A run is a folder with a `summary.json`; folders named <arm>-seed<k> beside each other are one arm. Runs that
failed, or are not finished, are listed.
"""

from collections.abc import Sequence
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from elastic.experiments.tools.arms import list_unfinished, read_arms, read_failures, read_summaries
from elastic.experiments.tools.charts import (
    compute_height,
    make_series,
    plot_against,
    plot_levels,
    plot_over_time,
)
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.figure import check_picture, draw_arms
from elastic.experiments.tools.html import list_failures, make_figure, make_page, make_section
from elastic.experiments.tools.options import call
from elastic.experiments.tools.results import ResultTable, list_csv, list_facts, make_tables, skips
from elastic.experiments.tools.tables import (
    check_marks,
    check_places,
    escape_markdown,
    format_markdown,
    write_between_marks,
    write_csv,
)
from elastic.experiments.tools.timing import time_runs
from elastic.files.atomic import write_atomically

WIDTH = 132  # characters of the table


def compare_runs(
    runs: str,
    csv: Path | None = None,
    markdown: Path | None = None,
    figure: Path | None = None,
    html: Path | None = None,
    latency: bool = False,
    baseline: str | None = None,
) -> None:
    """Show one table of many runs for each data set, and write them down where a file is named.

    Args:
        runs: a glob of their folders.
        csv: the table as a file.
        markdown: a text to put it into, between marks that name the command.
        figure: a picture of it.
        html: a page about it that opens anywhere, with more figures.
        latency: measure all networks, and their levels, on this machine.
        baseline: the arm that the others are compared with, seed by seed.
    """
    check_places(csv, html)
    check_picture(figure)
    if markdown is not None:
        check_marks(markdown, "compare", f"runs={runs}")
    summaries, notes = read_summaries(runs), []
    if latency:
        notes.append(time_runs(summaries))
    arms, failures = read_arms(runs, summaries), read_failures(runs)
    tables = make_tables(arms, baseline)
    for table in tables:
        show_table(table, table.title if len(tables) > 1 else None)
    missing = [f"failed: {name}: {reason}" for name, reason in failures.items()]
    missing += [f"not finished: {name}" for name in list_unfinished(runs)]
    for line in (*notes, *missing):
        print(line)
    if csv is not None:
        write_csv(csv, *list_csv(arms, baseline))
    if markdown is not None:
        titles = [f"{escape_markdown(table.title)}:\n\n" if len(tables) > 1 else "" for table in tables]
        texts = (title + format_markdown(t.head, t.rows) for title, t in zip(titles, tables, strict=True))
        write_between_marks(markdown, "compare", "\n\n".join(texts), of=f"runs={runs}")
    if figure is not None:
        draw_arms([table.arms for table in tables], "macs_dynamic" if skips(arms) else "params", figure)
    if html is not None:
        facts = {"Runs": runs, "Made": date.today().isoformat(), **list_facts(arms)}
        sections = (
            make_section(table.title if len(tables) > 1 else "", table, draw_figures(table, notes))
            for table in tables
        )
        page = make_page(make_title(tables), facts, [*sections, list_failures(failures)])
        write_atomically(html, lambda part: part.write_text(page))


def make_title(tables: Sequence[ResultTable]) -> str:
    """Make a title of what was compared, and on what."""
    networks = {
        str(run["model"]) for table in tables for arm in table.arms for run in arm.runs if "model" in run
    }
    count = sum(len(table.arms) for table in tables)
    data = ", ".join(dict.fromkeys(table.data for table in tables if table.data))
    parts = [
        f"{count} arms of {', '.join(sorted(networks)) or 'a network'}",
        *([f"on {data}"] if data else []),
    ]
    return " ".join(parts)


def show_table(table: ResultTable, title: str | None = None) -> None:
    """Print a table."""
    text = Table(Column("arm", overflow="fold"), *table.head[1:], title=title)
    for row in table.rows:
        text.add_row(*row)
    Console(width=WIDTH).print(text)


def draw_figures(table: ResultTable, notes: Sequence[str]) -> list[str]:
    """Draw the figures of a table for the page, as HTML."""
    series = make_series(table.arms)
    edge, note = "The grey line joins what no other arm beats in both.", " ".join(notes)
    work = ("macs_dynamic", "macs")
    figures = [
        ("size", edge, plot_against(series, "params", "parameters that are not zero")),
        ("work", edge, plot_against(series, "macs_dynamic", "MACs an image, mean")),
        ("latency", f"{edge} {note}", plot_against(series, "latency_ms", "ms an image")),
        ("training", edge, plot_against(series, "macs_training", "MACs of the training")),
    ]
    parts = "Of one network each, chosen at run time."
    titled = [(f"Accuracy against {cost}", caption, draw) for cost, caption, draw in figures]
    titled += [
        ("Levels and sets", parts, plot_levels(series, work, "10⁶ MACs an image, mean", 1e-6)),
        ("Levels and sets by latency", note, plot_levels(series, ("latency_ms",), "ms an image")),
        ("Size over time", "A line a run.", plot_over_time(series, "params", "parameters that are not zero")),
        (
            "Allocated over time",
            "A line a run.",
            plot_over_time(series, "params_dense", "parameters allocated"),
        ),
    ]
    height = compute_height(len(series))
    return [make_figure(title, caption, draw, height) for title, caption, draw in titled]


def main() -> None:
    silence()
    call(compare_runs)


if __name__ == "__main__":
    run(main)
