"""Small real runs for tests: the configuration a command line would give, in a folder of the test's own."""

import functools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from elastic.experiments.tools import composition

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
    cfg = pickle.loads(_compose(overrides))  # noqa: S301
    with open_dict(cfg), read_write(cfg):
        cfg.run = cfg.hydra.runtime.output_dir = str(folder)
        cfg.hydra.overrides.task[0] = f"run={folder}"
        HydraConfig.instance().set_config(cfg)
        del cfg["hydra"]
    return cfg


@functools.cache
def _compose(overrides: tuple[str, ...]) -> bytes:
    """Compose a configuration, its choices by Hydra, and once: it takes a third of a small run's time."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    is_plain = [o.type is OverrideType.CHANGE and not (CONF / o.key_or_group).is_dir() for o in parsed]
    choices = tuple(word for word, plain in zip(overrides, is_plain, strict=True) if not plain)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = pickle.loads(_compose_choices(choices))  # noqa: S301
        for o in (o for o, plain in zip(parsed, is_plain, strict=True) if plain):
            try:
                OmegaConf.update(cfg, o.key_or_group, o.value(), merge=True)
            except OmegaConfBaseException:  # Hydra says what is wrong
                cfg = pickle.loads(_compose_choices(overrides))  # noqa: S301
                break
        cfg.hydra.overrides.task = [cfg.hydra.overrides.task[0], *overrides]
        with patch.object(composition, "compose", _compose_again):
            return pickle.dumps(composition.remove_leftovers(cfg, overrides, cfg.hydra.runtime.choices))


def _compose_again(_: str, overrides: Sequence[str], return_hydra_config: bool = False) -> DictConfig:
    """Compose as `remove_leftovers` does to compare."""
    cfg: DictConfig = pickle.loads(_compose_choices(tuple(overrides)))  # noqa: S301
    return cfg


@functools.cache
def _compose_choices(overrides: tuple[str, ...]) -> bytes:
    cfg = compose("config", ["run=.", "hydra.runtime.output_dir=.", *overrides], return_hydra_config=True)
    return pickle.dumps(cfg)


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
