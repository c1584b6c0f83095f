"""Restore what a finished run has saved: its network, its data, and what it says of both."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from elastic.data import ImageData
from elastic.errors import ElasticError, FileError, OptionError, cite
from elastic.experiments.tools.checking import check_part
from elastic.experiments.tools.folders import CONFIG, SUMMARY, check_finished, load_config
from elastic.experiments.tools.parts import make_task
from elastic.experiments.tools.trust import trust_modules
from elastic.files.network import Network
from elastic.files.packing import read_about
from elastic.files.sums import check_sum, find_digest
from elastic.files.zoo import WEIGHTS
from elastic.training.tasks import Classification, Task


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


@torch.inference_mode(False)  # else the network could not be filled
def restore(folder: Path, trust: Sequence[str] = ()) -> FinishedRun:
    """Restore a finished run from its folder.

    Args:
        trust: modules whose classes and functions the run's configuration may name, beside this package's.

    Raises:
        FileError: the folder holds no finished run, or a damaged one, or names what is not trusted.
        StructureError: the weights are of another architecture.
        DataError: the data has other classes now.
    """
    trust_modules(trust)
    cfg = load_config(check_finished(folder))
    summary = read_summary(folder)
    if summary.get("weights", digest := find_digest(folder / WEIGHTS)) != digest:
        raise FileError(
            f"{folder / WEIGHTS} is damaged, or of another run: restore it, or finish the run with "
            f"run={folder}"
        )
    try:
        for part in ("task", "data", "model"):
            check_part(cfg, part)
    except OptionError as error:
        raise FileError(f"{folder / CONFIG} cannot be carried out: {error}") from error
    try:
        net, data = build_network(cfg)
    except (RuntimeError, MemoryError, OverflowError) as error:
        if isinstance(error, ElasticError):
            raise
        cause = cite(error)
        raise FileError(f"{folder / CONFIG} is of a network that cannot be built: {cause}") from error
    data.check_names(read_about(folder / WEIGHTS).get("classes", data.class_names))
    network = Network.load(folder / WEIGHTS, net, torch.zeros(1, *data.shape))
    return FinishedRun(network, data, make_task(cfg, data.classes), summary, cfg, folder)


def read_summary(folder: Path) -> dict[str, Any]:
    """Read the summary of a finished run.

    Raises:
        FileError: it is missing or damaged.
    """
    try:
        summary = json.loads((folder / SUMMARY).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{folder / SUMMARY} is damaged: finish the run with run={folder}") from error
    if not isinstance(summary, dict):
        raise FileError(f"{folder / SUMMARY} is damaged: finish the run with run={folder}")
    check_sum(folder / SUMMARY)
    return summary


def build_network(
    cfg: DictConfig, check: Callable[[DictConfig, ImageData], None] = lambda cfg, data: None
) -> tuple[nn.Module, ImageData]:
    """Build the network of a configuration as it is before anything has changed, and its data.

    Args:
        check: is asked between the two.
    """
    L.seed_everything(cfg.seed, verbose=False)
    data: ImageData = instantiate(cfg.data)
    check(cfg, data)
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
