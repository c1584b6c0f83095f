"""Show what dropping a part of each width costs and saves: `elastic sensitivity run=<folder> [json=<file>]`.

Each width is cut alone, its least important channels dropped, and measured on validation images; nothing is
trained. `callbacks.joint.sensitivity=<file>` (or `reconstruct`) sizes levels by it, within budgets.
"""

import json as json_format
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from elastic.data import ImageData
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.figure import check_picture, save_figure
from elastic.experiments.tools.options import call
from elastic.experiments.tools.restore import restore
from elastic.experiments.tools.tables import check_places, print_table, write_csv
from elastic.files.atomic import write_atomically
from elastic.levels.sensitivity import Cut, Evaluation, measure_sensitivity
from elastic.measure.machine import measure_latency_ms
from elastic.ranges import Count
from elastic.training.tasks import Task
from elastic.widths.discovery import discover

HEAD = ("width", "channels", "kept", "loss added", "metric lost", "MACs saved", "ms saved")


def show_sensitivity(
    run: Path,
    images: Count = 1000,
    latency: bool = False,
    json: Path | None = None,
    csv: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Show what dropping a part of each width costs on validation images, and what it saves.

    Args:
        run: the folder of a finished run.
        images: of the validation split, at most.
        latency: also measure the time of one image, on this machine.
        json: a file to write, by which levels are sized.
        csv: a table to write.
        figure: a picture to draw.

    Raises:
        FileError: the folder holds no finished run, or one with kernel activation modules; or nothing can be
            written where it is asked for.
    """
    check_places(json, csv)
    check_picture(figure)
    finished = restore(run).reject_modules()
    net = finished.network.plain()
    evaluate = Evaluator(finished.data, finished.task, images)
    time = (lambda cut: measure_latency_ms(cut, finished.example)) if latency else None
    curves = measure_sensitivity(
        net, discover(net, finished.example), finished.example, evaluate, latency_ms=time
    )
    rows = list_rows(curves)
    print_table(HEAD, rows, width=110)
    if json is not None:
        text = json_format.dumps(
            {name: [asdict(cut) for cut in curve] for name, curve in curves.items()}, indent=1
        )
        write_atomically(json, lambda part: part.write_text(text + "\n"))
    if csv is not None:
        write_csv(csv, HEAD, rows)
    if figure is not None:
        draw_sensitivity(curves, figure)


class Evaluator:
    """Evaluate networks on the same validation images."""

    def __init__(self, data: ImageData, task: Task, images: int) -> None:
        data.prepare_data()
        data.setup()
        self.task = task
        self.batches, count = [], 0
        for batch in data.val_dataloader():
            if count >= images:
                break
            x_BCHW, targets = data.on_after_batch_transfer(batch, 0)
            self.batches.append((x_BCHW[: images - count], targets[: images - count]))
            count += len(x_BCHW)

    @torch.no_grad()
    def __call__(self, net: nn.Module) -> Evaluation:
        metric = self.task.make_metrics()[self.task.metric]
        loss, count = 0.0, 0
        net.eval()
        for x_BCHW, targets in self.batches:
            outputs = net(x_BCHW)
            loss += len(x_BCHW) * float(self.task.compute_loss(outputs, targets))
            count += len(x_BCHW)
            metric.update(*self.task.predict(outputs, targets))
        return Evaluation(loss / count, float(metric.compute()))


def list_rows(curves: Mapping[str, Sequence[Cut]]) -> list[list[str]]:
    """List all cuts as text, those first that add least loss for each MAC saved."""
    pairs = [(name, curve[0].channels, cut) for name, curve in curves.items() for cut in curve[1:]]
    pairs.sort(key=lambda pair: pair[2].loss / max(pair[2].macs, 1.0))
    return [
        [
            *(name, str(channels), str(cut.channels)),
            *(f"{cut.loss:.4f}", f"{cut.metric:.4f}", f"{cut.macs:,.0f}", f"{cut.latency_ms:.3f}"),
        ]
        for name, channels, cut in pairs
    ]


def draw_sensitivity(curves: Mapping[str, Sequence[Cut]], path: Path) -> None:
    """Draw the loss that each width's cuts add against what they save, a line a width."""
    figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, curve in curves.items():
        panel.plot([cut.macs for cut in curve], [cut.loss for cut in curve], "o-", ms=3, label=name)
    panel.set(xlabel="MACs saved, for one input", ylabel="loss added")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize="x-small", ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def main() -> None:
    silence()
    call(show_sensitivity)


if __name__ == "__main__":
    run(main)
