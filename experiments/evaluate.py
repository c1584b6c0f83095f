"""Measure a finished run again from its saved weights: `python -m experiments.evaluate run=<folder>`.

Rebuilds the network from `config.yaml` and `model.safetensors`, runs the test split, and ends with one line
of JSON under the keys of `summary.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from elastic.checkpoint import load_compact
from elastic.module import TrainingError
from experiments.report import measure
from experiments.setup import quiet, run, saved_config
from experiments.train import build


def evaluate(folder: Path) -> dict[str, Any]:
    """The summary of a run as its files give it now.

    Raises:
        TrainingError: the folder holds no finished run.
    """
    for name in ("config.yaml", "model.safetensors", "summary.json"):
        if not (folder / name).exists():
            raise TrainingError(
                f"{folder / name} is missing: finish the run with run={folder}, or name another"
            )
    cfg = saved_config(folder)
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except ValueError as error:
        raise TrainingError(
            f"{folder / 'summary.json'} is damaged: finish the run with run={folder}"
        ) from error
    module, data = build(cfg)
    plain = load_compact(module.net, folder / "model.safetensors", module.example)
    return summary | measure(plain, data)


def main() -> None:
    quiet()
    given = OmegaConf.from_dotlist(sys.argv[1:])
    if list(given) != ["run"] or given.run is None:
        raise TrainingError("usage: python -m experiments.evaluate run=<folder of a finished run>")
    print(json.dumps(evaluate(Path(str(given.run)))))


if __name__ == "__main__":
    run(main)
