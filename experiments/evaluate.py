"""Measure a finished run again: `python -m experiments.evaluate run=<folder> [level=…] [set=…]`.

Rebuilds the network from `config.yaml` and `model.safetensors`, runs the test split, and ends with one line
of JSON under the keys of `summary.json`; of a network with levels, all of them or the one named.
"""

import json
from pathlib import Path
from typing import Any

from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.experiments.tools.restore import restore
from elastic.experiments.tools.summary import measure_level, measure_network


def evaluate(run: Path, level: int | None = None, set: int | None = None) -> dict[str, Any]:
    """Measure a finished run again: its summary as its files give it now.

    Args:
        run: the folder of a finished run.
        level: measure this level, 0 being the smallest, instead of the whole network.
        set: measure with this set of kernel activation modules, instead of all of them.

    Raises:
        FileError: the folder holds no finished run.
        OptionError: the network has no such level or set.
    """
    finished = restore(run)
    if level is None and set is None:
        return finished.summary | measure_network(finished.network, finished.data, finished.task)
    sets = None if set is None else [set]
    return finished.summary | measure_level(finished.network, finished.data, finished.task, level, sets)


def main() -> None:
    silence()
    print(json.dumps(call(evaluate)))


if __name__ == "__main__":
    run(main)
