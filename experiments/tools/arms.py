"""Gather finished runs into arms: the seeds of one configuration, with its levels and its sets of modules.

A run is a folder with a `summary.json`; folders named <arm>-seed<k> beside each other are one arm.
"""

import glob
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from elastic.errors import FileError
from elastic.experiments.tools.folders import CONFIG, SUMMARY
from elastic.experiments.tools.metrics import find_metric
from elastic.experiments.tools.sweep import FAILED
from elastic.experiments.tools.tables import compute_sd
from elastic.files.sums import check_sum

# Of a summary, beside its metric.
NUMBERS = ("params", "params_dense", "macs", "macs_dynamic", "macs_training", "latency_ms", "wall_s")
Summary = dict[str, Any]
History = list[dict[str, Any]]  # what the census found in each epoch of a run


@dataclass(frozen=True)
class Arm:
    """Hold the runs of one configuration.

    Attributes:
        name: of their folders, without the seed; and which level or set it is.
        label: the same, without what all arms on the same data have in common.
        runs: their summaries, a seed each.
        histories: of those that kept one.
    """

    name: str
    label: str
    runs: Sequence[Summary]
    histories: Sequence[History] = field(default=())

    @property
    def data(self) -> str:
        """Name the data set."""
        return str(self.runs[0].get("data") or "")

    @property
    def metric(self) -> str:
        """Name the metric that the runs are judged by, a key of their summaries."""
        return find_metric(self.runs[0])

    def list_values(self, key: str) -> list[float]:
        """List a figure of all runs; of none, where one of them lacks it."""
        values = [run[key] for run in self.runs if run.get(key) is not None]
        return values if len(values) == len(self.runs) else []

    def compute_mean(self, key: str) -> tuple[float, float] | None:
        """Compute mean and sample standard deviation, 0 of a single run; None where a run lacks it."""
        values = self.list_values(key)
        if not values:
            return None
        return statistics.mean(values), compute_sd(values) if len(values) > 1 else 0.0


def read_arms(pattern: str, summaries: Mapping[Path, Summary]) -> list[Arm]:
    """Gather summaries into arms, the smallest first; levels and sets of modules are arms of their own.

    Args:
        pattern: of the runs' folders.
    """
    names = name_arms(pattern)
    # What was seen on other data, or is judged by another metric, is no seed of the same arm.
    groups: dict[tuple[str, str, str], list[Summary]] = defaultdict(list)
    histories: dict[tuple[str, str, str], list[History]] = defaultdict(list)
    for folder, summary in summaries.items():
        for suffix, part in _split_summary(summary):
            key = (names[folder] + suffix, str(part.get("data") or ""), find_metric(part))
            groups[key].append(part)
            if not suffix:
                histories[key] += read_history(folder)
    arms = [Arm(key[0], key[0], runs, histories[key]) for key, runs in groups.items()]
    return sorted(_label(arms), key=lambda arm: arm.compute_mean("params") or ())


def _split_summary(summary: Summary) -> list[tuple[str, Summary]]:
    """Split a summary into those of the network, of its other levels, and of its other sets."""
    common = {key: value for key, value in summary.items() if key not in ("levels", "sets")}
    shared = {"data": summary.get("data", ""), "seed": summary.get("seed")}
    levels = (summary.get("levels") or [])[:-1]  # the last one is the network itself
    sets = (summary.get("sets") or [])[1:]  # the first one is what the summary is of
    return [
        ("", summary),
        *((f" level {row['level']}", shared | {"macs_dynamic": row.get("macs")} | row) for row in levels),
        *((f" set {row['set']}", common | row) for row in sets),
    ]


def _label(arms: Sequence[Arm]) -> list[Arm]:
    """Label arms by what varies among those on the same data."""
    names: dict[str, set[str]] = defaultdict(set)
    for arm in arms:
        names[arm.data].add(_find_stem(arm.name))
    labels = {data: shorten_names(sorted(stems)) for data, stems in names.items()}
    return [replace(arm, label=_find_label(arm, labels[arm.data])) for arm in arms]


def _find_label(arm: Arm, labels: Mapping[str, str]) -> str:
    stem = _find_stem(arm.name)
    return labels[stem] + arm.name.removeprefix(stem)


def _find_stem(name: str) -> str:
    return re.sub(r" (level|set) \d+$", "", name)


def shorten_names(names: Sequence[str]) -> dict[str, str]:
    """Shorten names by the parts, between dashes, that all of them have; unless nothing were left of one."""
    parts = {name: re.findall(r"[^/]+/|[^-/]+", name) for name in names}
    common = set.intersection(*(set(own) for own in parts.values())) if len(names) > 1 else set()
    short = {
        name: "-".join(part for part in own if part not in common).replace("/-", "/")
        for name, own in parts.items()
    }
    if not all(short.values()) or len(set(short.values())) < len(names):
        return {name: name for name in names}
    return short


def name_arms(pattern: str) -> dict[Path, str]:
    """Name the arm of each folder that matches: its name without the seed.

    Where they lie in several folders, with as much of those as tells them apart: the same name may be of
    different questions.
    """
    return {folder: re.sub(r"-seed\d+$", "", name) for folder, name in name_folders(pattern).items()}


def name_folders(pattern: str) -> dict[Path, str]:
    """Name each folder that matches, with as much of what it lies in as tells those apart."""
    text = str(Path(pattern).expanduser())
    matches = [text] if Path(text).is_dir() else sorted(glob.glob(text))  # signs of a glob may be in a name
    folders = [Path(match) for match in matches if Path(match).is_dir()]
    parents = {folder.parent.parts for folder in folders}
    depth = 0
    while len({parts[len(parts) - depth :] for parts in parents}) < len(parents):
        depth += 1
    return {folder: "/".join(folder.parts[len(folder.parts) - 1 - depth :]) for folder in folders}


def read_summaries(pattern: str) -> dict[Path, Summary]:
    """Read the summaries of all runs that match, by folder.

    Raises:
        FileError: there is none, or a damaged one.
    """
    files = {folder: folder / "summary.json" for folder in name_arms(pattern)}
    summaries = {folder: _read_summary(file) for folder, file in files.items() if file.exists()}
    if not summaries:
        raise FileError(f"no summary.json under {pattern}: name finished runs, say runs='outputs/*/*'")
    return summaries


def _read_summary(path: Path) -> Summary:
    try:
        summary: Summary = json.loads(path.read_text())
        metric = summary[find_metric(summary)]  # without one there is nothing to compare
        sum((metric, *(summary.get(key) or 0 for key in NUMBERS)))  # of numbers, no words
        parts = [(kind, row) for kind in ("levels", "sets") for row in summary.get(kind) or []]
        sum(row[find_metric(row)] for kind, row in parts if row[kind[:-1]] is not None)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path} is damaged: finish its run again, or leave it out of runs") from error
    check_sum(path)
    return summary


def read_failures(pattern: str) -> dict[str, str]:
    """Read why runs of a sweep failed, by folder."""
    notes = {name: folder / FAILED for folder, name in name_folders(pattern).items()}
    return {name: _read_reason(note) for name, note in notes.items() if note.exists()}


def list_unfinished(pattern: str) -> list[str]:
    """List the runs that have begun, and neither finished nor failed, by folder."""
    return [
        name
        for folder, name in name_folders(pattern).items()
        if (folder / CONFIG).exists() and not any((folder / end).exists() for end in (SUMMARY, FAILED))
    ]


def _read_reason(note: Path) -> str:
    try:
        return str(json.loads(note.read_text())["error"])
    except (ValueError, TypeError, KeyError):
        return f"{note.name} is damaged"


def read_history(folder: Path) -> list[History]:
    """Read what the census found in each epoch of a run, if it kept that.

    Raises:
        FileError: it is damaged.
    """
    path = folder / "history.jsonl"
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        sum(row[key] for row in rows for key in ("epoch", "params", "params_dense"))
    except (ValueError, TypeError, KeyError) as error:
        raise FileError(f"{path} is damaged: finish its run again, or leave it out of runs") from error
    return [rows]
