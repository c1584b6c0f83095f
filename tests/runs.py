"""Small real runs for tests: the configuration a command line would give, in a folder of the test's own."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write

from elastic.experiments.tools.composition import settle

CONF = Path(__file__).parents[1] / "conf"
TINY = (
    "callbacks.progress=null",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "data.batch_size=256",
    "trainer.max_epochs=3",
)


def configure(folder: Path, *overrides: str) -> DictConfig:
    """What `python -m experiments.train run=<folder> <overrides>` would run, resolved."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = copy.deepcopy(_composed(overrides))
    with open_dict(cfg), read_write(cfg):
        cfg.run = cfg.hydra.runtime.output_dir = str(folder)
        cfg.hydra.overrides.task[0] = f"run={folder}"
        HydraConfig.instance().set_config(cfg)
        del cfg["hydra"]
    return cfg


@functools.cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    """It takes half a second, and a run that is killed and resumed is asked for three times."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = ["run=.", "hydra.runtime.output_dir=.", *overrides]
        cfg = compose("config", given, return_hydra_config=True)
        return settle(cfg, overrides, cfg.hydra.runtime.choices)


def load(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=True)


def load_history(folder: Path) -> dict[str, Any]:
    """Load what has happened to the network, as the run's last checkpoint tells it."""
    history: dict[str, Any] = load(folder / "last.ckpt")["state_dict"]["structure._extra_state"]
    return history


def without_account(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Whatever W&B keeps, it keeps in this folder; and there is no account."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        patch.setenv(name, str(folder))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        patch.delenv(name, raising=False)
