"""Measure what skipping kernels saves in time, beside what it saves in MACs.

    python -m experiments.latency run=<folder> [set=0] [level=…] [images=256] [csv=<file>]

Images of the test split go through several networks in turn: the dense one in stock PyTorch, as it is
and with its norms folded in both memory formats; the same in our kernel, nothing skipped; and the network
with its modules. Ratios are of medians over the batches. The last columns say what part of the time is saved
for each part of the MACs saved, modules counted, against the best of stock PyTorch and against our kernel.
"""

import statistics
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
from elastic.experiments.tools.tables import write_csv
from elastic.experiments.tools.timing import TUNED_ON, make_stock
from elastic.measure.timing import Network as Execution
from elastic.measure.timing import measure_medians_ms

BATCHES, THREADS = (1, 8, 64), (1, 2)
STOCK = ("stock", "folded", "channels_last")
TIMES = (*STOCK, "kernel", "skipping")
HEAD = ("threads", "batch", *TIMES, "macs")


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
    if images < 1:
        raise OptionError(f"latency cannot be measured with {images} images: set images to 1 or more")
    finished = restore(run)
    dynamic = finished.network.dynamic(level, set)
    plain, images_NCHW = finished.network.plain(level), sample_images(finished.data, images)
    rows = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        for size in BATCHES:
            row = measure_executions(plain, dynamic, images_NCHW.split(size))
            rows.append(row | {"threads": threads, "batch": size})
    Console(width=140).print(_make_table(rows))
    if csv is not None:
        values = ([row["threads"], row["batch"], *(f"{row[key]:.4f}" for key in HEAD[2:])] for row in rows)
        write_csv(csv, HEAD, values)


def measure_executions(net: nn.Module, dynamic: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Measure each execution's milliseconds, and the part of the dense MACs that is active."""
    samples = inputs[:TUNED_ON]
    executions: dict[str, Execution] = {
        **make_stock(net),
        "kernel": make_skipping(net, samples),
        "skipping": make_skipping(dynamic, samples),
    }
    times = dict(zip(executions, measure_medians_ms(list(executions.values()), inputs), strict=True))
    cost = ActivationCost(dynamic, inputs[0])
    fractions = []
    with torch.inference_mode():
        for x_BCHW in inputs:
            dynamic(x_BCHW)
            fractions.append(float(cost.fraction("macs")))
    sizes = [len(x_BCHW) for x_BCHW in inputs]  # the last may be smaller
    return times | {"macs": statistics.fmean(fractions, sizes)}


def _make_table(rows: Sequence[dict[str, float]]) -> Table:
    heads = (*(f"{name}, ms" for name in TIMES), "MACs", "÷ stock", "÷ kernel", "saved ÷ MACs saved")
    table = Table("threads", "batch", *heads)
    for row in rows:
        fastest = min(row[name] for name in STOCK)
        ratios = [row["skipping"] / dense for dense in (fastest, row["kernel"])]
        savings = [(1 - ratio) / (1 - row["macs"]) for ratio in ratios]
        table.add_row(
            *(str(row[key]) for key in ("threads", "batch")),
            *(f"{row[key]:.3f}" for key in (*TIMES, "macs")),
            *(f"{ratio:.2f}" for ratio in ratios),
            " and ".join(f"{saving:.2f}" for saving in savings),
        )
    return table


def main() -> None:
    silence()
    call(show_latency)


if __name__ == "__main__":
    run(main)
