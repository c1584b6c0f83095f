"""Read and keep the folder of a run: its configuration, its checkpoint, the lock while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from elastic.errors import BusyError, FileError, TrainingError

CONFIG, CHECKPOINT, SUMMARY = "config.yaml", "last.ckpt", "summary.json"
FINISHED = (CONFIG, "model.safetensors", SUMMARY)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep any second run out of the folder meanwhile; a process that is killed lets go of it.

    Raises:
        BusyError: one trains there.
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


def continue_config(cfg: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration of a run: a folder that holds one already is continued with its own.

    Raises:
        TrainingError: overrides that would make a continued run another one.
    """
    cfg.run = str(folder)
    has_begun = (folder / CHECKPOINT).exists()
    has_options = any(not text.startswith("run=") for text in HydraConfig.get().overrides.task)
    if has_begun and has_options:
        raise TrainingError(
            f"{folder} holds a run already: continue it with run={folder} alone, or name another folder"
        )
    if has_options or not (has_begun or (folder / CONFIG).exists()):
        return cfg
    saved = load_config(folder)
    saved.run = str(folder)
    return saved


def load_config(folder: Path) -> DictConfig:
    """Load the configuration that a run was started with.

    Raises:
        FileError: it is missing or damaged.
    """
    try:
        cfg = OmegaConf.load(folder / CONFIG)
    except (yaml.YAMLError, OSError) as error:
        raise FileError(f"{folder / CONFIG} cannot be read: restore it or train again") from error
    if not isinstance(cfg, DictConfig):
        raise FileError(f"{folder / CONFIG} is no configuration: restore it or train again")
    return cfg


def check_finished(folder: Path) -> Path:
    """Return the folder, if it holds a finished run.

    Raises:
        FileError: a file is missing.
    """
    for name in FINISHED:
        if not (folder / name).exists():
            raise FileError(f"{folder / name} is missing: finish the run with run={folder}, or name another")
    return folder


def find_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint to continue from, if there is one.

    Raises:
        FileError: it is damaged.
    """
    checkpoint = folder / CHECKPOINT
    if not checkpoint.exists():
        return None
    try:
        torch.load(checkpoint, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle raises whatever the bytes make it do
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise FileError(f"{checkpoint} cannot be read ({cause}): restore it, or remove it") from error
    return checkpoint


def make_portable(cfg: DictConfig) -> DictConfig:
    """Resolve a configuration but for what depends on the machine: folders and the environment."""
    raw, resolved = (OmegaConf.to_container(cfg, resolve=resolve) for resolve in (False, True))
    portable = OmegaConf.create(_resolve(raw, resolved))
    portable.run = "."
    return portable


def _resolve(raw: Any, resolved: Any) -> Any:
    if isinstance(raw, dict):
        return {key: _resolve(raw[key], resolved[key]) for key in raw}
    if isinstance(raw, list):
        return [_resolve(*pair) for pair in zip(raw, resolved, strict=True)]
    depends = isinstance(raw, str) and ("${run}" in raw or "${oc.env" in raw)
    return raw if depends else resolved
