"""Measure a finished run again: `python -m experiments.evaluate run=<folder> [level=<number>]`.

Rebuilds the network from `config.yaml` and `model.safetensors`, runs the test split, and ends with one line
of JSON under the keys of `summary.json`; of a network with levels, all of them or the one asked for.
"""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from elastic.errors import TrainingError
from elastic.experiments.tools.restore import level_of, restore, restore_switched
from elastic.experiments.tools.setup import quiet, run
from elastic.experiments.tools.summary import measure, measure_levels
from elastic.levels.nested import Levels


def evaluate(folder: Path, level: int | None = None) -> dict[str, Any]:
    """The summary of a run as its files give it now.

    Args:
        level: measure this level, 0 being the smallest, instead of the whole network.

    Raises:
        TrainingError: the folder holds no finished run, or not that level.
    """
    net, data, summary = restore(folder)
    switched = restore_switched(net, folder, data)
    if level is not None:
        return summary | measure(level_of(net, level), data, switched[level] if switched else None)
    last = switched[-1] if switched else None
    if isinstance(net, Levels):
        return summary | measure(net.net, data, last) | {"levels": measure_levels(net, data, switched)}
    return summary | measure(net, data, last)


def main() -> None:
    quiet()
    given = OmegaConf.from_dotlist(sys.argv[1:])
    level = given.get("level")
    if given.get("run") is None or set(given) - {"run", "level"} or not isinstance(level, int | None):
        raise TrainingError("usage: python -m experiments.evaluate run=<finished run> [level=<number>]")
    print(json.dumps(evaluate(Path(str(given.run)), level)))


if __name__ == "__main__":
    run(main)
