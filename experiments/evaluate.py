"""Measure a finished run again: `python -m experiments.evaluate run=<folder> [level=…] [set=…]`.

Rebuilds the network from `config.yaml` and `model.safetensors`, runs the test split, and ends with one line
of JSON under the keys of `summary.json`; of a network with levels, all of them or the one named.
"""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from elastic.errors import TrainingError
from elastic.experiments.tools.restore import restore
from elastic.experiments.tools.setup import quiet, run
from elastic.experiments.tools.summary import measure_level, measure_network


def evaluate(run: Path, level: int | None = None, set: int | None = None) -> dict[str, Any]:
    """Measure a finished run again: its summary as its files give it now.

    Args:
        level: measure this level, 0 being the smallest, instead of the whole network.
        set: measure with this set of kernel activation modules, instead of all of them.

    Raises:
        FileError: the folder holds no finished run.
        OptionError: the network has no such level or set.
    """
    finished = restore(run)
    if level is None and set is None:
        return finished.summary | measure_network(finished.network, finished.data)
    sets = None if set is None else [set]
    return finished.summary | measure_level(finished.network, finished.data, level, sets)


def main() -> None:
    quiet()
    given = OmegaConf.from_dotlist(sys.argv[1:])
    numbers = {name: given.get(name) for name in ("level", "set")}
    whole = all(isinstance(number, int | None) for number in numbers.values())
    if given.get("run") is None or set(given) - {"run", "level", "set"} or not whole:
        raise TrainingError(
            "usage: python -m experiments.evaluate run=<finished run> [level=<number>] [set=<number>]"
        )
    print(json.dumps(evaluate(Path(str(given.run)), **numbers)))


if __name__ == "__main__":
    run(main)
