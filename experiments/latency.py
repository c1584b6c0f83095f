"""Measure what skipping kernels saves in time, beside what it saves in MACs.

    python -m experiments.latency run=<folder> [set=0] [level=…] [images=256] [csv=<file>]

Images of the test split go through several networks in turn: the dense one in stock PyTorch, whatever is
fastest there, eager or compiled, in ONNX Runtime and in OpenVINO (extras `export` and `openvino`), and in our
kernel, nothing skipped; and the network with its modules. Ratios are of medians over the batches. The last
column says what part of the time is saved, against the best of the others, for each part of the MACs saved.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from elastic.dynamic.loss import ActivationCost
from elastic.dynamic.skipping import make_skipping
from elastic.errors import OptionError
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.experiments.tools.per_image import sample_images
from elastic.experiments.tools.restore import restore
from elastic.experiments.tools.rivals import PYTORCH, RUNTIMES, make_rivals
from elastic.experiments.tools.tables import check_places, write_csv
from elastic.experiments.tools.timing import TUNED_ON
from elastic.measure.timing import Network as Execution
from elastic.measure.timing import measure_medians_ms

BATCHES, THREADS = (1, 8, 64), (1, 2)
SETTLE_S = 0.015  # with several threads, of which each runtime has its own
RIVALS = (PYTORCH, *RUNTIMES)
KERNEL, SKIPPING = "kernel, dense", "skipping"
HEAD = ("threads", "batch", *RIVALS, KERNEL, SKIPPING, "macs")
Row = dict[str, float]


def show_latency(
    run: Path, level: int | None = None, set: int = 0, images: int = 256, csv: Path | None = None
) -> None:
    """Time a dynamic network beside its dense one, in batches of several sizes, on one and two threads.

    Args:
        run: the folder of a finished run.
        level: of a network with levels, 0 being the smallest; the largest by default.
        set: of the modules.
        images: of the test split, how many.
        csv: a table to write.
    """
    check_places(csv)
    if images < 1:
        raise OptionError(f"latency cannot be measured with {images} images: set images to 1 or more")
    finished = restore(run)
    dynamic = finished.network.dynamic(level, set)
    plain, images_NCHW = finished.network.plain(level), sample_images(finished.data, images)
    rows = measure_rows(plain, dynamic, images_NCHW, THREADS)
    Console(width=140).print(_make_table(rows))
    if csv is not None:
        write_csv(csv, HEAD, ([format_cell(row.get(key)) for key in HEAD] for row in rows))


def measure_rows(
    net: nn.Module, dynamic: fx.GraphModule, images_NCHW: Tensor, threads: Sequence[int]
) -> list[Row]:
    """Measure a dynamic network beside its dense one, on some threads, in batches of several sizes.

    On one thread that is processor time, so that what else runs here counts little.
    """
    before, rows = torch.get_num_threads(), []
    try:
        for number in threads:
            torch.set_num_threads(number)
            for size in BATCHES:
                row = measure_executions(net, dynamic, images_NCHW.split(size))
                rows.append({"threads": number, "batch": size} | row)
    finally:
        torch.set_num_threads(before)
    return rows


def measure_executions(net: nn.Module, dynamic: fx.GraphModule, inputs: Sequence[Tensor]) -> Row:
    """Measure each execution's milliseconds, and the part of the dense MACs that is active."""
    samples = inputs[:TUNED_ON]
    executions: dict[str, Execution] = {
        **make_rivals(net, inputs, torch.get_num_threads()),
        KERNEL: make_skipping(net, samples, "kernel"),
        SKIPPING: make_skipping(dynamic, samples),
    }
    alone = torch.get_num_threads() == 1
    clock, settle_s = (time.process_time, 0.0) if alone else (time.perf_counter, SETTLE_S)
    medians = measure_medians_ms(list(executions.values()), inputs, clock, settle_s)
    return dict(zip(executions, medians, strict=True)) | {"macs": measure_active(dynamic, inputs)}


def measure_active(dynamic: fx.GraphModule, inputs: Sequence[Tensor]) -> float:
    """Measure the part of the dense MACs that images engage, modules counted."""
    cost = ActivationCost(dynamic, inputs[0])
    fractions = []
    with torch.inference_mode():
        for x_BCHW in inputs:
            dynamic(x_BCHW)
            fractions.append(float(cost.fraction("macs")))
    return statistics.fmean(fractions, [len(x_BCHW) for x_BCHW in inputs])  # the last may be smaller


def compare_with_best(row: Row) -> dict[str, float]:
    """Divide by the best of the dense executions elsewhere; what is saved, by what is saved of the MACs."""
    best = min(row[name] for name in RIVALS if name in row)
    ratio = row[SKIPPING] / best
    saved = (1 - ratio) / (1 - row["macs"]) if row["macs"] < 1 else float("nan")
    return {f"{KERNEL} ÷ best": row[KERNEL] / best, f"{SKIPPING} ÷ best": ratio, "saved ÷ MACs saved": saved}


def format_cell(value: float | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def list_cells(row: Row) -> dict[str, str]:
    """List the cells of a row by the heads of their columns."""
    named = {"threads": row["threads"], "images": row["batch"], "MACs": row["macs"]}
    times = {f"{name} (ms)": row.get(name) for name in (*RIVALS, KERNEL, SKIPPING)}
    cells = {**named, **times}
    ratios = {name: f"{ratio:.2f}" for name, ratio in compare_with_best(row).items()}
    return {name: format_cell(value) for name, value in cells.items()} | ratios


def _make_table(rows: Sequence[Row]) -> Table:
    table = Table(*list_cells(rows[0]))
    for row in rows:
        table.add_row(*list_cells(row).values())
    return table


def main() -> None:
    silence()
    call(show_latency)


if __name__ == "__main__":
    run(main)
