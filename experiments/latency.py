"""What skipping kernels saves in time, beside what it saves in MACs.

    python -m experiments.latency run=<folder> [set=0] [level=…] [images=256] [csv=<file>]

Images of the test split go through several networks in turn: the dense one in stock PyTorch, as it is
and with its norms folded in both memory formats; the same in our kernel, nothing skipped; and the network
with its modules. Ratios are of medians over the batches. The last columns say what part of the time is saved
for each part of the MACs saved, modules counted, against the best of stock PyTorch and against our kernel.
"""

import statistics
import sys
from collections.abc import Sequence
from csv import writer as write_rows
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from elastic.data import ImageData
from elastic.dynamic.loss import ActivationCost
from elastic.dynamic.skipping import make_masked, make_skipping
from elastic.errors import TrainingError
from elastic.experiments.tools.per_image import batches
from elastic.experiments.tools.restore import chosen
from elastic.experiments.tools.setup import quiet, run
from elastic.measure.timing import Network, measure_medians_ms

BATCHES, THREADS, TUNED_ON = (1, 8, 64), (1, 2), 8


def stock(net: nn.Module) -> dict[str, Network]:
    """The ways of stock PyTorch: the network as it is, and with its norms folded in both memory formats."""
    return {
        "stock": net.eval(),
        "folded": make_masked(net, torch.contiguous_format),
        "channels_last": make_masked(net, torch.channels_last),
    }


def some_images(data: ImageData, count: int) -> Tensor:
    """Some images of the test split, always the same ones, as networks take them."""
    images_NCHW = torch.cat([x_BCHW for x_BCHW, _ in batches(data)])
    return images_NCHW[torch.randperm(len(images_NCHW), generator=torch.Generator().manual_seed(0))[:count]]


def compare(net: nn.Module, gated: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Milliseconds of each way for these inputs, and the part of the dense MACs that is engaged."""
    tuned = inputs[:TUNED_ON]
    ways = stock(net) | {"kernel": make_skipping(net, tuned), "skipping": make_skipping(gated, tuned)}
    found = dict(zip(ways, measure_medians_ms(list(ways.values()), inputs), strict=True))
    engaged = ActivationCost(gated, inputs[0])
    with torch.inference_mode():
        shares = []
        for x_BCHW in inputs:
            gated(x_BCHW)
            shares.append(float(engaged.fraction("macs")))
    sizes = [len(x_BCHW) for x_BCHW in inputs]  # the last may be smaller
    return found | {"macs": statistics.fmean(shares, sizes)}


def show_latency(
    run: Path, level: int | None = None, set: int = 0, images: int = 256, csv: Path | None = None
) -> None:
    """Time a dynamic network beside its dense one, in batches of several sizes, on one and two threads.

    Args:
        level: of a network with levels, 0 being the smallest; the largest without one.
        set: of the modules.
        images: of the test split, how many.
        csv: a table to write.
    """
    plain, gated, data = chosen(run, level, set)
    images_NCHW = some_images(data, images)

    columns = ("threads", "batch", "stock", "folded", "channels_last", "kernel", "skipping", "macs")
    table = Table(
        *columns[:2],
        *(f"{name}, ms" for name in columns[2:7]),
        "MACs",
        "÷ stock",
        "÷ kernel",
        "saved ÷ MACs saved",
    )
    rows = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        for size in BATCHES:
            found = compare(plain, gated, images_NCHW.split(size))
            best = min(found[name] for name in ("stock", "folded", "channels_last"))
            ratios = [found["skipping"] / dense for dense in (best, found["kernel"])]
            saved = [(1 - ratio) / (1 - found["macs"]) for ratio in ratios]
            rows.append([threads, size, *(found[name] for name in columns[2:])])
            table.add_row(
                *(str(threads), str(size), *(f"{found[name]:.3f}" for name in columns[2:7])),
                *(f"{found['macs']:.3f}", *(f"{ratio:.2f}" for ratio in ratios)),
                " and ".join(f"{each:.2f}" for each in saved),
            )
    Console(width=140).print(table)
    if csv is not None:
        with csv.open("w", newline="") as file:
            writer = write_rows(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([*row[:2], *(f"{value:.4f}" for value in row[2:])] for row in rows)


def main() -> None:
    quiet()
    given = OmegaConf.merge({"images": 256, "set": 0}, OmegaConf.from_dotlist(sys.argv[1:]))
    numbers = (OmegaConf.select(given, "level", default=0), given.set, given.images)
    if (
        "run" not in given
        or set(given) - {"run", "set", "level", "images", "csv"}
        or not all(isinstance(number, int) for number in numbers)
        or given.images < 1
    ):
        raise TrainingError(
            "usage: python -m experiments.latency run=<folder> [set=…] [level=…] [images=…] [csv=…]"
        )
    csv = Path(str(given.csv)) if "csv" in given else None
    show_latency(Path(str(given.run)), OmegaConf.select(given, "level"), given.set, given.images, csv)


if __name__ == "__main__":
    run(main)
