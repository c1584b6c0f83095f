"""What a finished run has saved, as a network again."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from elastic.data import ImageData
from elastic.dynamic.modules import select_set
from elastic.errors import TrainingError
from elastic.experiments.tools.setup import finished, saved_config
from elastic.experiments.train import build
from elastic.files.network import (
    holds_levels,
    holds_switched,
    load_compact,
    load_levels,
    load_switched,
    refuse_switched,
)
from elastic.levels.nested import Levels


def restore(folder: Path) -> tuple[nn.Module | Levels, ImageData, dict[str, Any]]:
    """The network of a finished run, with its levels if it has any, its data and its summary.

    Raises:
        TrainingError: the folder holds no finished run, or a damaged one.
        StructureError: the weights are missing or damaged, or of another architecture.
    """
    cfg = saved_config(finished(folder))
    cfg.init = None  # the saved weights say all
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except ValueError as error:
        raise TrainingError(
            f"{folder / 'summary.json'} is damaged: finish the run with run={folder}"
        ) from error
    module, data = build(cfg)
    weights = folder / "model.safetensors"
    load = load_levels if holds_levels(weights) else load_compact
    return load(module.net, weights, module.structure.example), data, summary


def restore_plain(folder: Path) -> tuple[nn.Module | Levels, ImageData]:
    """The network of a finished run and its data, for those who know nothing of kernel activation modules.

    Raises:
        TrainingError: see `restore`.
        StructureError: see there; or it has such modules.
    """
    net, data, _ = restore(folder)
    refuse_switched(folder / "model.safetensors")
    return net, data


def teacher(run: str | None) -> nn.Module:
    """The network of a finished run, the largest if it has levels, to be learnt from; with its modules.

    Raises:
        TrainingError: no run is named, or it is not finished.
        StructureError: see `restore`.
    """
    if run is None:
        raise TrainingError("there is nobody to learn from: set init=<folder of a finished run>")
    net, data, _ = restore(Path(run))
    switched = restore_switched(net, Path(run), data)
    return switched[-1] if switched else net.net if isinstance(net, Levels) else net


def restore_switched(net: nn.Module | Levels, folder: Path, data: ImageData) -> list[fx.GraphModule]:
    """The network, or each of its levels, with its kernel activation modules; nothing where it has none."""
    weights = folder / "model.safetensors"
    return load_switched(net, weights, torch.zeros(1, *data.shape)) if holds_switched(weights) else []


def chosen(folder: Path, level: int | None, chosen_set: int) -> tuple[nn.Module, fx.GraphModule, ImageData]:
    """A level of a finished run (the largest without a number), with a set of its modules, and its data.

    Raises:
        TrainingError: there is no such level.
        StructureError: the run has no kernel activation modules, or no such set of them.
    """
    net, data, _ = restore(folder)
    switched = load_switched(net, folder / "model.safetensors", torch.zeros(1, *data.shape))
    level = len(switched) - 1 if level is None else level
    if not 0 <= level < len(switched):
        raise TrainingError(f"there is no level {level}: the run's network has 0 … {len(switched) - 1}")
    select_set(switched[level], chosen_set)
    return net[level] if isinstance(net, Levels) else net, switched[level], data


def level_of(net: nn.Module | Levels, level: int) -> nn.Module:
    """One level of a run's network, 0 being the smallest.

    Raises:
        TrainingError: there is none such.
    """
    if not isinstance(net, Levels):
        raise TrainingError(f"there is no level {level}: the run's network has none; leave the level out")
    if not 0 <= level < len(net):
        raise TrainingError(f"there is no level {level}: the run's network has 0 … {len(net) - 1}")
    return net[level]
