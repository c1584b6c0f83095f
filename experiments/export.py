"""Write a finished run's network for other programs: `python -m experiments.export run=<folder> to=<file>`.

With `level=<number>` it is that level. The file ends in .pt2 (torch.export) or .onnx (extra `export`), takes
any batch size, and has been checked against the network. Images come normalised as the run's data was; the
file says how.

A network with kernel activation modules is written with one set of them, masked: all kernels are computed,
and the maps of those that are off are multiplied by zero.
"""

from pathlib import Path

from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.experiments.tools.restore import restore
from elastic.files.exporting import export


def export_run(run: Path, to: Path, level: int | None = None, set: int | None = None) -> None:
    """Write the network of a finished run, or one of its levels, for other programs.

    Args:
        run: the folder of a finished run.
        to: a file that ends in .pt2 (torch.export) or .onnx.
        level: write this level, 0 being the smallest, instead of the whole network.
        set: of the kernel activation modules, where there are any; the first by default.

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
    about = {
        "mean": data.mean,
        "std": data.std,
        "classes": data.classes,
        "data": finished.config.choices.data,
    }
    export(net, finished.example, to, about)
    print(f"{to}: {to.stat().st_size:,} bytes, equal to the network to 1e-5{note}")


def main() -> None:
    silence()
    call(export_run)


if __name__ == "__main__":
    run(main)
