"""Write a finished run's network for other programs: `python -m experiments.export run=<folder> to=<file>`.

With `level=<number>` it is that level. The file ends in .pt2 (torch.export) or .onnx (extra `export`), takes
any batch size, and has been checked against the network. Images come normalised as the run's data was.
"""

import sys
from pathlib import Path

from omegaconf import OmegaConf

from elastic.errors import TrainingError
from elastic.experiments.tools.restore import restore
from elastic.experiments.tools.setup import quiet, run
from elastic.files.exporting import export


def export_run(run: Path, to: Path, level: int | None = None) -> None:
    """Write the network of a finished run, or one of its levels, for other programs.

    Raises:
        FileError: the folder holds no finished run, or the network cannot be written.
        OptionError: there is no such level, or no such kind of file.
    """
    finished = restore(run).reject_modules()
    export(finished.network.plain(level), finished.example, to)
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
