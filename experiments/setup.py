"""What every entry point needs before it starts: readable errors, quiet libraries, the right precision."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elastic.data import DataError
from elastic.errors import StructureError
from elastic.module import TrainingError

OURS = (DataError, StructureError, TrainingError, OmegaConfBaseException, OSError)


def one_line_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Show what a user can mend as one line and exit with 1; `HYDRA_FULL_ERROR=1` shows all."""

    @functools.wraps(main)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except (*OURS, InstantiationException) as error:
            cause: BaseException = error
            while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
                cause = cause.__cause__
            if os.environ.get("HYDRA_FULL_ERROR") or not isinstance(cause, (*OURS, InstantiationException)):
                raise
            print(f"error: {str(cause).strip().splitlines()[0]}", file=sys.stderr)
            sys.exit(1)

    return guarded


def quiet() -> None:
    """Silence advice that does not apply here, and make the CPU flush denormals."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the sets are held in memory
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")  # a run's folder is its own
    torch.set_flush_denormal(True)


def precision(asked: str) -> str:
    """`auto` is bf16 autocast where the GPU or CPU computes in it."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _fast_bf16() else "32-true"


def _fast_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def settings(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration of a run: a folder that holds one already is continued with its own.

    Raises:
        TrainingError: overrides that would make a continued run another one.
    """
    saved = folder / "config.yaml"
    if not saved.exists():
        return cfg
    held = OmegaConf.load(saved)
    assert isinstance(held, DictConfig)
    given = [text for text in HydraConfig.get().overrides.task if not text.startswith("run=")]
    if any(text.split("=")[0].lstrip("+~") not in ("trainer.max_epochs",) for text in given):
        raise TrainingError(
            f"{folder} holds a run already: continue it with run={folder} alone, or name another folder"
        )
    held.merge_with_dotlist(given)
    return held
