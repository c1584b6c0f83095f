"""What every entry point needs before it starts: readable errors, quiet libraries, the right precision."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elastic.errors import BusyError, ElasticError, SweepError, TrainingError

OURS = (ElasticError,)  # they say all that is needed
# What a user can mend; anything else is a fault of the code and keeps its traceback.
THEIRS = (*OURS, OmegaConfBaseException, HydraException, OSError)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No second run trains in the folder meanwhile; a process that is killed lets go of it.

    Raises:
        BusyError: one does.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]  # the first process of the run has it
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise BusyError(f"another process trains in {folder}: wait until it has ended, or stop it") from error


def run(main: Callable[[], Any]) -> None:
    """Call an entry point; what a user can mend is shown as one line, with exit code 1.

    `HYDRA_FULL_ERROR=1` shows the whole traceback.
    """
    full = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would print errors its own way, over many lines
    try:
        main()
    except THEIRS as error:
        if full:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


def one_line(error: BaseException) -> str:
    """What went wrong, as a user would want to read it."""
    cause = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).strip().splitlines()] or [type(cause).__name__]
    shown = " ".join(lines[:2]) if isinstance(cause, HydraException) else lines[0]
    if cause is not error and not isinstance(cause, OURS):
        shown += f" ({str(error).splitlines()[-1]})"
    return shown


def active(cfg: DictConfig) -> dict[str, DictConfig]:
    """The callbacks of a run by name: an experiment may set options of one that its schedule leaves out."""
    return {name: c for name, c in cfg.callbacks.items() if c is not None and "_target_" in c}


def quiet() -> None:
    """Silence advice that does not apply here, and make the CPU flush denormals."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the sets are held in memory
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings(
        "ignore", ".*`srun` command is available.*"
    )  # launchers use it, nobody else has to
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # what is logged is the same in every process
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")  # a run's folder is its own
    torch.set_flush_denormal(True)


def precision(asked: str) -> str:
    """`auto` is bf16 autocast where the GPU or CPU computes in it."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    # On CPUs without such instructions bf16 is emulated, and slower than fp32.
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16-mixed" if native else "32-true"


def settings(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration of a run: a folder that holds one already is continued with its own.

    Raises:
        TrainingError: overrides that would make a continued run another one.
    """
    cfg.run = str(folder)
    if not (folder / "last.ckpt").exists():
        return cfg
    if any(not text.startswith("run=") for text in HydraConfig.get().overrides.task):
        raise TrainingError(
            f"{folder} holds a run already: continue it with run={folder} alone, or name another folder"
        )
    return OmegaConf.merge(saved_config(folder), {"run": str(folder)})  # type: ignore[return-value]


def saved_config(folder: Path) -> DictConfig:
    try:
        held = OmegaConf.load(folder / "config.yaml")
    except (yaml.YAMLError, OSError) as error:
        raise TrainingError(f"{folder / 'config.yaml'} cannot be read: restore it or train again") from error
    assert isinstance(held, DictConfig)
    return held


def finished(folder: Path) -> Path:
    """The folder, if it holds a finished run.

    Raises:
        TrainingError: a file is missing.
    """
    for name in ("config.yaml", "model.safetensors", "summary.json"):
        if not (folder / name).exists():
            raise TrainingError(
                f"{folder / name} is missing: finish the run with run={folder}, or name another"
            )
    return folder


def readable(checkpoint: Path) -> Path | None:
    """The checkpoint to continue from, if there is one.

    Raises:
        TrainingError: it is damaged.
    """
    if not checkpoint.exists():
        return None
    try:
        torch.load(checkpoint, weights_only=True, map_location="cpu")
    except Exception as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise TrainingError(f"{checkpoint} cannot be read ({cause}): restore it, or remove it") from error
    return checkpoint


def check_processes(trainer: L.Trainer) -> None:
    """Several processes are started by Lightning's `ddp`, or by SLURM, for one run at a time.

    Raises:
        TrainingError: another way, of which this process, or the runs of a sweep, would not know the outcome.
    """
    if trainer.world_size == 1:
        return
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise TrainingError("such processes take the result along as they end: set trainer.strategy=ddp")
    relaunches = isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)
    if relaunches and multirun():
        raise SweepError(
            "a sweep cannot start runs of several processes, each would sweep again: leave out -m, or sweep "
            "with hydra/launcher=submitit_slurm"
        )


def multirun() -> bool:
    """Whether this run is one of a sweep."""
    return bool(HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)


def portable(cfg: DictConfig) -> DictConfig:
    """The configuration, resolved but for what depends on the machine: folders and the environment."""

    def settle(raw: Any, resolved: Any) -> Any:
        if isinstance(raw, dict):
            return {key: settle(raw[key], resolved[key]) for key in raw}
        if isinstance(raw, list):
            return [settle(*pair) for pair in zip(raw, resolved, strict=True)]
        elsewhere = isinstance(raw, str) and ("${run}" in raw or "${oc.env" in raw)
        return raw if elsewhere else resolved

    raw = OmegaConf.to_container(cfg, resolve=False)
    return OmegaConf.create(settle(raw, OmegaConf.to_container(cfg, resolve=True)) | {"run": "."})
