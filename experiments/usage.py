"""How often the kernels of a network with kernel activation modules are on, and what images take.

    python -m experiments.usage run=<folder> [level=<number>] [set=<number>] [figure=<png>] [csv=<file>]

Prints the part of the images for which each layer's kernels are on; the figure has that, kernel by kernel,
the MACs of each class and of each image, and the images that took least and most.
"""

import csv
import sys
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


def main() -> None:
    quiet()
    given = OmegaConf.from_dotlist(sys.argv[1:])
    numbers = (given.get("level", 0), given.get("set", 0))
    known = {"run", "level", "set", "figure", "csv"}
    if "run" not in given or set(given) - known or not all(isinstance(number, int) for number in numbers):
        raise TrainingError(
            "usage: python -m experiments.usage run=<folder> [level=…] [set=…] [figure=…] [csv=…]"
        )
    _, gated, data = chosen(Path(str(given.run)), given.get("level"), given.get("set", 0))
    seen = run_per_image(gated, data)
    table = Table("convolution", "kernels", "on, mean (%)", "always on", "never on")
    for name, duty_K in seen.duty.items():
        always, never = int((duty_K == 1).sum()), int((duty_K == 0).sum())
        table.add_row(name, str(len(duty_K)), f"{100 * duty_K.mean():.1f}", str(always), str(never))
    Console().print(table)
    print(f"test accuracy {seen.accuracy:.2%}, {seen.macs:,.0f} MACs an image, modules included")
    if "csv" in given:
        with open(str(given.csv), "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["convolution", "kernel", "on"])
            for name, duty_K in seen.duty.items():
                writer.writerows([name, k, f"{on:.4f}"] for k, on in enumerate(duty_K.tolist()))
    if "figure" in given:
        raw_NCHW = torch.cat([x for x, _ in data.test_dataloader()])
        draw_duty(seen, raw_NCHW.permute(0, 2, 3, 1).numpy(), Path(str(given.figure)))


if __name__ == "__main__":
    run(main)
