"""A finished run's network for other programs: `python -m experiments.export run=<folder> to=<file>`.

With `level=<number>` it is that level. The file ends in .pt2 (torch.export) or .onnx (extra `export`), takes
any batch size, and has been checked against the network. Images come normalised as the run's data was.
"""

import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from elastic.errors import TrainingError
from elastic.experiments.tools.restore import level_of, restore_plain
from elastic.experiments.tools.setup import quiet, run
from elastic.files.exporting import export
from elastic.levels.nested import Levels


def export_run(run: Path, to: Path, level: int | None = None) -> None:
    """Write the network of a finished run, or one of its levels, for other programs.

    Raises:
        TrainingError: the folder holds no finished run, or not that level.
        StructureError: the network cannot be written.
    """
    net, data = restore_plain(run)
    chosen = level_of(net, level) if level is not None else net.net if isinstance(net, Levels) else net
    export(chosen, torch.zeros(1, *data.shape), to)
    print(f"{to}: {to.stat().st_size:,} bytes, equal to the network to 1e-5")


def main() -> None:
    quiet()
    given = OmegaConf.from_dotlist(sys.argv[1:])
    level = given.get("level")
    if not {"run", "to"} <= set(given) <= {"run", "to", "level"} or not isinstance(level, int | None):
        raise TrainingError(
            "usage: python -m experiments.export run=<finished run> to=<file.pt2 or .onnx> [level=<number>]"
        )
    export_run(Path(str(given.run)), Path(str(given.to)), level)


if __name__ == "__main__":
    run(main)
