"""Prepare a process for its task: quiet libraries, the right precision, processes that it will hear of."""

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from elastic.errors import FileError, SweepError, TrainingError, cite
from elastic.experiments.tools.errors import FULL, THEIRS
from elastic.experiments.tools.processes import forks_others, speak_for_others, starts_others
from elastic.experiments.tools.signals import Interrupted, keep_raising
from elastic.training.kinds import PACKAGES

ADVICE = (
    ".*does not have many workers.*",  # the sets are held in memory
    ".*LeafSpec.*",
    ".*`srun` command is available.*",  # launchers use it, nobody else has to
    ".*sync_dist=True.*",  # what is logged is the same in every process
    ".*exists and is not empty.*",  # a run's folder is its own
    ".*dirpath has changed.*",  # it may have been moved
    ".*You requested to overfit.*",  # and does what is meant
)

MOST = 8  # processes on a CPU, unless it has more cores


def silence() -> None:
    """Silence advice that does not apply here, and make the CPU flush denormals."""
    for package in PACKAGES:  # the one that is imported last speaks for both
        for name in ("utilities.rank_zero", "accelerators.cuda", "trainer.connectors.signal_connector"):
            logging.getLogger(f"{package}.{name}").setLevel(logging.WARNING)
    for message in ADVICE:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a compiler looks for CUDA
    torch.set_flush_denormal(True)


class EndOnSignals(L.Callback):
    """End all processes of a run on a signal, at once: Lightning would go on, and end as if it were done."""

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        keep_raising()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        keep_raising()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        launcher = trainer.strategy.launcher
        if isinstance(exception, Interrupted) and launcher is not None:
            launcher.kill(signal.SIGTERM)


class StayStopped(L.Callback):
    """Keep a run ended that has been stopped early: named again, Lightning would train one more epoch."""

    stopped: int | None = None  # the epochs that were planned when it was

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.should_stop:
            checkpoint["stopped"] = trainer.max_epochs

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.stopped = checkpoint.get("stopped")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.stopped is not None and self.stopped == trainer.max_epochs:  # no more have been asked for
            trainer.should_stop = True


class SettingUp(L.Callback):
    """Remember whether training has begun."""

    has_begun = False
    checkpoint: Path | None = None  # that training is to go on from
    folder = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.has_begun, self.folder = True, trainer.default_root_dir


@contextmanager
def explain_faults() -> Iterator[SettingUp]:
    """Turn what fails before training has begun into one line: options and files are what it depends on.

    Yields:
        What has to be among the callbacks.

    Raises:
        TrainingError: something has failed, or later another process of the run.
        FileError: a checkpoint does not fit.
    """
    setting_up = SettingUp()
    try:
        yield setting_up
    except THEIRS:
        raise
    except Exception as error:
        if setting_up.has_begun and (end := _find_process(error)):
            raise TrainingError(f"{end}: go on with elastic train run={setting_up.folder}") from error
        if setting_up.has_begun and _is_of_callbacks(error):
            raise TrainingError(f"{cite(error)}: look at the callbacks") from error
        if setting_up.has_begun:
            raise
        cause = cite(error)
        if setting_up.checkpoint is not None:
            raise FileError(
                f"{setting_up.checkpoint} does not fit the run ({type(error).__name__}: {cause}): restore "
                "it, or remove it and train again"
            ) from error
        raise TrainingError(
            f"the run cannot be set up ({type(error).__name__}: {cause}): look at the options; {FULL}=1 "
            "shows where"
        ) from error


def _find_process(error: BaseException | None) -> str | None:
    """Find which other process has failed, by words: torch's loaders and gloo have no kind of error.

    That of a loader comes by a signal, in the midst of anything, which may make another error of it.
    """
    if error is None:
        return None
    if isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error):
        return "another process of the run has died, or cannot be reached"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
        return "a process that reads batches has died, perhaps for want of memory"
    return _find_process(error.__cause__ or error.__context__)


def _is_of_callbacks(error: Exception) -> bool:
    """Tell whether one of Lightning's callbacks cannot do what it was told, and finds out in training."""
    return isinstance(error, MisconfigurationException) or "conditioned on metric" in str(error)


def check_processes(trainer: L.Trainer) -> None:
    """Refuse several processes but by Lightning's `ddp`, or by SLURM, for one run at a time.

    Raises:
        TrainingError: another way, of which this process, or the runs of a sweep, would not know the outcome.
    """
    if trainer.world_size == 1:
        return
    maximum = max(MOST, os.cpu_count() or 1)
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > maximum:
        raise TrainingError(
            f"{trainer.num_devices} processes on this CPU: set trainer.devices to {maximum} or less"
        )
    if forks_others(trainer):
        raise TrainingError("such processes take the result along as they end: set trainer.strategy=ddp")
    if not starts_others(trainer):
        return
    if is_multirun():
        raise SweepError(
            "a sweep cannot start runs of several processes, each would sweep again: leave out -m, or sweep "
            "with hydra/launcher=submitit_slurm"
        )
    speak_for_others()


def is_multirun() -> bool:
    """Tell whether this run is one of a sweep."""
    return bool(HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)
