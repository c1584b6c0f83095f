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


def main() -> None:
    quiet()
    given = OmegaConf.from_dotlist(sys.argv[1:])
    level = given.get("level")
    if not {"run", "to"} <= set(given) <= {"run", "to", "level"} or not isinstance(level, int | None):
        raise TrainingError(
            "usage: python -m experiments.export run=<finished run> to=<file.pt2 or .onnx> [level=<number>]"
        )
    net, data = restore_plain(Path(str(given.run)))
    chosen = level_of(net, level) if level is not None else net.net if isinstance(net, Levels) else net
    path = Path(str(given.to))
    export(chosen, torch.zeros(1, *data.shape), path)
    print(f"{path}: {path.stat().st_size:,} bytes, equal to the network to 1e-5")


if __name__ == "__main__":
    run(main)
