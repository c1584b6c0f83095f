"""Measure a finished run again: `python -m experiments.evaluate run=<folder> [level=…] [set=…]`.

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


def evaluate(run: Path, level: int | None = None, set: int | None = None) -> dict[str, Any]:
    """Measure a finished run again: its summary as its files give it now.

    Args:
        level: measure this level, 0 being the smallest, instead of the whole network.
        set: measure with this set of kernel activation modules, instead of all of them.

    Raises:
        TrainingError: the folder holds no finished run, or not that level.
    """
    net, data, summary = restore(run)
    switched = restore_switched(net, run, data)
    levels, row = net if isinstance(net, Levels) else None, dict[str, Any]()
    plain = level_of(net, level) if level is not None else levels.net if levels is not None else net
    modules = switched[-1 if level is None else level] if switched else None
    measured = measure(plain, data, modules)
    if set is not None:
        if not 0 <= set < len(measured["sets"]):
            raise TrainingError(
                f"there is no set {set} of kernel activation modules: the network has {len(measured['sets'])}"
            )
        row = {**measured["sets"][set], "sets": []}
        del row["set"]
    elif level is None and levels is not None:
        row = {"levels": measure_levels(levels, data, switched)}
    return summary | measured | row


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
