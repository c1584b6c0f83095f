"""Write a finished run's network for other programs: `python -m experiments.export run=<folder> to=<file>`.

With `level=<number>` it is that level. The file ends in .pt2 (torch.export), .onnx, .xml (OpenVINO), .pte
(ExecuTorch) or .tflite (LiteRT), each but the first with an extra, and has been checked against the network.
Images come normalised as the run's data was; the file says how, where its format has a place for that.

A network with kernel activation modules is written with one set of them, masked: all kernels are computed,
and the maps of those that are off are multiplied by zero.

With `int8=true` the format's own tool brings it to 8 bits, calibrated on training images, and the accuracy on
the validation split is told before and after.
"""

from pathlib import Path

import torch

from elastic.data import ImageData
from elastic.experiments.tools.about import describe_data
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.experiments.tools.restore import restore
from elastic.files.exporting import export, open_exported
from elastic.files.formats import Run
from elastic.training.tasks import Task
from elastic.widths.leaves import list_tensors

CALIBRATION = 512  # images


def export_run(
    run: Path, to: Path, level: int | None = None, set: int | None = None, int8: bool = False
) -> None:
    """Write the network of a finished run, or one of its levels, for other programs.

    Args:
        run: the folder of a finished run.
        to: a file that ends in .pt2, .onnx, .xml (OpenVINO), .pte (ExecuTorch) or .tflite (LiteRT).
        level: write this level, 0 being the smallest, instead of the whole network.
        set: of the kernel activation modules, where there are any; the first by default.
        int8: bring it to 8 bits by the format's own tool.

    Raises:
        FileError: the folder holds no finished run, or the network cannot be written.
        OptionError: there is no such level or set, or no such kind of file.
    """
    finished = restore(run)
    network, data, note = finished.network, finished.data, ""
    net = network.plain(level)
    if network.sets or set is not None:
        net = network.dynamic(level, set or 0)
        note = f"; set {set or 0} of its modules masks kernels, none is skipped"
    about = {"data": finished.config.choices.data, **describe_data(data), **network.about}
    calibration = data.sample(CALIBRATION, seed=0)[0].split(32) if int8 else ()
    difference = export(net, finished.example, to, about, calibration)
    amount = f"outputs differ by at most {difference:.0e}, relative to the largest"
    print(f"{to}: {to.stat().st_size:,} bytes, {amount}{note}")
    if int8:
        before = measure_run(lambda x_BCHW: list_tensors(net(x_BCHW)), data, finished.task)
        after = measure_run(open_exported(to), data, finished.task)
        print(f"validation {finished.task.metric}: {before:.4f} in 32 bits, {after:.4f} in 8")


@torch.no_grad()
def measure_run(run: Run, data: ImageData, task: Task, split: str = "val", images: int = 10**9) -> float:
    """Measure the task's metric on the validation or the test split, in whatever runs the network.

    Args:
        split: "val" or "test".
        images: how many of its first images are enough.
    """
    data.setup()
    metric, count = task.make_metrics()[task.metric], 0
    for batch in data.test_dataloader() if split == "test" else data.val_dataloader():
        if count >= images:
            break
        x_BCHW, targets = data.on_after_batch_transfer(batch, 0)
        (outputs,) = run(x_BCHW)
        metric.update(*task.predict(outputs, targets))
        count += len(x_BCHW)
    return float(metric.compute())


def main() -> None:
    silence()
    call(export_run)


if __name__ == "__main__":
    run(main)
