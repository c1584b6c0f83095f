"""Read the structural events of a run, one a line of JSON, and the growth among them, which can be replayed.

A row has epoch, step, why, before and after, and either `width` (channels) or `stage` (blocks).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic.errors import StructureError, TrainingError, cite
from elastic.files.sums import check_sum
from elastic.training.structure import Structure

MOST = 2**20  # channels of a width, or epochs: beyond it a file asks for what no machine has


def read_timeline(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a `timeline.jsonl`.

    Raises:
        StructureError: there is no such file, or it is none of a run.
    """
    path = Path(path)
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        cause = cite(error)
        raise StructureError(f"{path} cannot be read ({cause}): name the timeline.jsonl of a run") from error
    for row in rows:
        counts = [row.get(key) for key in ("epoch", "before", "after")] if isinstance(row, dict) else [None]
        are_counts = all(type(n) is int and 0 <= n <= MOST for n in counts)
        if not are_counts or not isinstance(row.get("width", row.get("stage")), str):
            raise StructureError(f"{path} is no timeline of a run: name a timeline.jsonl")
    check_sum(path)
    return rows


def select_growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Select the rows of growth. Pruning is not replayed: channels die elsewhere in another run."""
    return [row for row in rows if row["after"] > row["before"]]


def find_growth_at(rows: Sequence[dict[str, Any]], epoch: int) -> tuple[dict[str, int], list[str]]:
    """Find what grew as an epoch began: the channels that widths then had, the stages deepened."""
    present = [row for row in select_growth(rows) if row["epoch"] == epoch]
    sizes = {row["width"]: row["after"] for row in present if "width" in row}
    return sizes, [row["stage"] for row in present if "stage" in row]


def check_replay(rows: Sequence[dict[str, Any]], structure: Structure) -> None:
    """Refuse rows of another network, before anything is trained.

    Raises:
        TrainingError: the network has not what they tell of, or began otherwise.
    """
    stages = structure.start_depth
    for row in select_growth(rows):
        name = str(row.get("width", row.get("stage")))
        in_stage = any(name.startswith(f"{stage}." if stage else "") for stage in stages)
        if name not in structure.widths and name not in stages and not in_stage:
            raise TrainingError(
                f"the timeline tells of '{name}', which this network has not: replay it on the network, and "
                "with the start, of its own run"
            )
    if not structure.timeline:  # a run that goes on has other blocks by now, and was checked
        _check_starts(rows, "width", structure.start_sizes)
        _check_starts(rows, "stage", stages)


def _check_starts(rows: Sequence[dict[str, Any]], kind: str, sizes: Mapping[str, int]) -> None:
    """Refuse rows before whose first event a width, or a stage, had another size than the network's."""
    starts = {row[kind]: row["before"] for row in reversed(rows) if kind in row}
    for name, start in starts.items():
        size = sizes.get(name, start)
        if size != start:
            raise TrainingError(
                f"the timeline begins with {start} in the {kind} '{name}', this network with {size}: "
                "replay it on the network, and with the start, of its own run"
            )
