"""Show how often the kernels of a dynamic network are on, and what images take.

    python -m experiments.usage run=<folder> [level=…] [set=…] [figure=<png>] [csv=<file>] [classes=<file>]

Prints the part of the images for which each layer's kernels are on; the figure has that, kernel by kernel,
the MACs of each class and of each image, and the images that took least and most.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.figure import check_picture
from elastic.experiments.tools.metrics import list_shown
from elastic.experiments.tools.options import call
from elastic.experiments.tools.per_image import PerImage, run_per_image
from elastic.experiments.tools.restore import restore
from elastic.experiments.tools.runtime_figures import draw_kernel_usage
from elastic.experiments.tools.tables import check_places, write_csv


def show_kernel_usage(
    run: Path,
    level: int | None = None,
    set: int = 0,
    figure: Path | None = None,
    csv: Path | None = None,
    classes: Path | None = None,
) -> None:
    """Show how often each layer's kernels are on over the test split, and what images take.

    Args:
        run: the folder of a finished run.
        level: of a network with levels, 0 being the smallest; the largest by default.
        set: of the modules.
        figure: a picture to draw.
        csv: a table of every kernel to write.
        classes: a table of every class to write: how many images are right, and what they take.
    """
    check_places(csv, classes)
    check_picture(figure)
    finished = restore(run)
    if classes is not None or figure is not None:
        finished.require_classes()
    images = run_per_image(finished.network.dynamic(level, set), finished.data, finished.task)
    Console().print(_make_table(images))
    figures = ", ".join(map(" ".join, list_shown(images.metrics)))
    print(f"{figures}, {images.macs:,.0f} MACs an image, modules included")
    if csv is not None:
        write_csv(csv, ["layer", "kernel", "on"], _list_kernels(images))
    if classes is not None:
        write_csv(classes, ["class", "images", "right (%)", "MACs, mean"], _list_classes(images))
    if figure is not None:
        raw_NCHW = torch.cat([x_BCHW for x_BCHW, _ in finished.data.test_dataloader()])
        draw_kernel_usage(images, raw_NCHW.permute(0, 2, 3, 1).numpy(), figure)


def _make_table(images: PerImage) -> Table:
    table = Table("layer", "kernels", "on, mean (%)", "always on", "never on")
    for name, usage_K in images.usage.items():
        always, never = int((usage_K == 1).sum()), int((usage_K == 0).sum())
        table.add_row(name, str(len(usage_K)), f"{100 * usage_K.mean():.1f}", str(always), str(never))
    return table


def _list_kernels(images: PerImage) -> Iterator[tuple[str, int, str]]:
    """List every kernel with the part of the images for which it was on."""
    for name, usage_K in images.usage.items():
        for k, part in enumerate(usage_K.tolist()):
            yield name, k, f"{part:.4f}"


def _list_classes(images: PerImage) -> Iterator[list[str]]:
    """List every class of the test split."""
    for label in images.label_N.unique().tolist():
        is_own = images.label_N == label
        accuracy, macs = images.correct_N[is_own].double().mean(), images.macs_N[is_own].double().mean()
        yield [str(label), str(int(is_own.sum())), f"{100 * accuracy:.2f}", f"{macs:.0f}"]


def main() -> None:
    silence()
    call(show_kernel_usage)


if __name__ == "__main__":
    run(main)
