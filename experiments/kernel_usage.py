"""How often the kernels of a network with kernel activation modules are on, and what images take.

    python -m experiments.kernel_usage run=<folder> [level=…] [set=…] [figure=<png>] [csv=<file>]

Prints the part of the images for which each layer's kernels are on; the figure has that, kernel by kernel,
the MACs of each class and of each image, and the images that took least and most.
"""

import sys
from csv import writer as write_rows
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from elastic.errors import TrainingError
from elastic.experiments.tools.figure import draw_duty
from elastic.experiments.tools.per_image import run_per_image
from elastic.experiments.tools.restore import chosen
from elastic.experiments.tools.setup import quiet, run


def show_kernel_usage(
    run: Path, level: int | None = None, set: int = 0, figure: Path | None = None, csv: Path | None = None
) -> None:
    """Show how often each layer's kernels are on over the test split, and what images take.

    Args:
        level: of a network with levels, 0 being the smallest; the largest without one.
        set: of the modules.
        figure: a picture to draw.
        csv: a table of every kernel to write.
    """
    _, gated, data = chosen(run, level, set)
    seen = run_per_image(gated, data)
    table = Table("convolution", "kernels", "on, mean (%)", "always on", "never on")
    for name, duty_K in seen.duty.items():
        always, never = int((duty_K == 1).sum()), int((duty_K == 0).sum())
        table.add_row(name, str(len(duty_K)), f"{100 * duty_K.mean():.1f}", str(always), str(never))
    Console().print(table)
    print(f"test accuracy {seen.accuracy:.2%}, {seen.macs:,.0f} MACs an image, modules included")
    if csv is not None:
        with csv.open("w", newline="") as file:
            writer = write_rows(file, lineterminator="\n")
            writer.writerow(["convolution", "kernel", "on"])
            for name, duty_K in seen.duty.items():
                writer.writerows([name, k, f"{on:.4f}"] for k, on in enumerate(duty_K.tolist()))
    if figure is not None:
        raw_NCHW = torch.cat([x for x, _ in data.test_dataloader()])
        draw_duty(seen, raw_NCHW.permute(0, 2, 3, 1).numpy(), figure)


def main() -> None:
    quiet()
    given = OmegaConf.from_dotlist(sys.argv[1:])
    numbers = (given.get("level", 0), given.get("set", 0))
    known = {"run", "level", "set", "figure", "csv"}
    if "run" not in given or set(given) - known or not all(isinstance(number, int) for number in numbers):
        raise TrainingError(
            "usage: python -m experiments.kernel_usage run=<folder> [level=…] [set=…] [figure=…] [csv=…]"
        )
    figure, csv = (Path(str(given[name])) if name in given else None for name in ("figure", "csv"))
    show_kernel_usage(Path(str(given.run)), given.get("level"), given.get("set", 0), figure, csv)


if __name__ == "__main__":
    run(main)
