"""Restore what a finished run has saved: its network, its data, and what it says of both."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from elastic.data import ImageData
from elastic.errors import FileError, OptionError
from elastic.experiments.tools.folders import check_finished, load_config
from elastic.experiments.tools.parts import make_task
from elastic.files.network import Network
from elastic.training.tasks import Classification, Task

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class FinishedRun:
    """Hold what a finished run has saved."""

    network: Network
    data: ImageData
    task: Task
    summary: dict[str, Any]
    config: DictConfig
    folder: Path

    @property
    def example(self) -> torch.Tensor:
        """Make an input of the network."""
        return torch.zeros(1, *self.data.shape)

    def reject_modules(self) -> "FinishedRun":
        """Refuse kernel activation modules, for a caller that cannot run them.

        Raises:
            FileError: the network has some.
        """
        self.network.reject_modules(self.folder / WEIGHTS)
        return self

    def require_classes(self) -> "FinishedRun":
        """Refuse a task that does not tell a class an image, for a caller that asks whether it is right.

        Raises:
            OptionError: it is another one.
        """
        if not isinstance(self.task, Classification):
            raise OptionError(
                f"{self.folder} is a run of {type(self.task).__name__.lower()}: name a run of classification"
            )
        return self


def restore(folder: Path) -> FinishedRun:
    """Restore a finished run from its folder.

    Raises:
        FileError: the folder holds no finished run, or a damaged one.
        StructureError: the weights are of another architecture.
    """
    cfg = load_config(check_finished(folder))
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except ValueError as error:
        raise FileError(f"{folder / 'summary.json'} is damaged: finish the run with run={folder}") from error
    net, data = build_network(cfg)
    network = Network.load(net, folder / WEIGHTS, torch.zeros(1, *data.shape))
    return FinishedRun(network, data, make_task(cfg, data.classes), summary, cfg, folder)


def build_network(cfg: DictConfig) -> tuple[nn.Module, ImageData]:
    """Build the network of a configuration as it is before anything has changed, and its data."""
    L.seed_everything(cfg.seed, verbose=False)
    data: ImageData = instantiate(cfg.data)
    return instantiate(cfg.model, in_channels=data.shape[0], classes=data.classes), data


def restore_teacher(run: str | None) -> nn.Module:
    """Restore the network of a finished run to learn from: the largest level, with its modules if it has any.

    Raises:
        OptionError: no run is named.
        FileError: see `restore`.
        StructureError: see there.
    """
    if run is None:
        raise OptionError("there is nobody to learn from: set init=<folder of a finished run>")
    network = restore(Path(run)).network
    return network.dynamic() if network.sets else network.plain()
