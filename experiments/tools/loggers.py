"""Make the loggers of a run, which go on with what they have where it goes on from a checkpoint."""

import os
from collections.abc import Mapping

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig

from elastic.errors import OptionError

# What loggers call the name that their server gives to a run; they make another run where it is not given.
IDS = {
    "lightning.pytorch.loggers.WandbLogger": "id",
    "lightning.pytorch.loggers.MLFlowLogger": "run_id",
}


class LoggerMark(L.Callback):
    """Keep the names that servers have given to a run in its checkpoints."""

    def __init__(self, cfg: DictConfig) -> None:
        self.nodes = list_loggers(cfg)
        self.ids: dict[str, str] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Where Lightning only tries a run, it has loggers of its own.
        for (name, node), logger in zip(self.nodes.items(), trainer.loggers, strict=False):
            if node.get("_target_") in IDS and logger.version:
                self.ids[name] = str(logger.version)

    def state_dict(self) -> dict[str, str]:
        return self.ids


def list_loggers(cfg: DictConfig) -> dict[str, DictConfig]:
    """List the loggers of a configuration by name."""
    return {name: node for name, node in (cfg.get("logger") or {}).items() if node is not None}


def make_loggers(cfg: DictConfig, ids: Mapping[str, str] | None = None) -> list[Logger]:
    """Make all that a run is logged to.

    Args:
        ids: what servers call the run that goes on, by the names of loggers.

    Raises:
        OptionError: a package is missing, or an account.
    """
    return [make_logger(name, node, (ids or {}).get(name)) for name, node in list_loggers(cfg).items()]


def make_logger(name: str, node: DictConfig, run: str | None) -> Logger:
    """Make one of them; see `make_loggers`."""
    key = IDS.get(node.get("_target_"))
    own = {} if key is None or run is None or node.get(key) is not None else {key: run}
    try:
        logger: Logger = instantiate(node, **own)
    except InstantiationException as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        raise OptionError(
            f"logger={name} needs a package that is not installed: pip install 'elastic-cnn[{name}]'"
        ) from error
    if isinstance(logger, WandbLogger) and not logger._offline and is_without_account():
        raise OptionError(
            f"logger.{name} needs an account: log in with `wandb login`, or leave logger.{name}.offline=true"
        )
    return logger


def is_without_account() -> bool:
    """Tell whether W&B would have to ask who is there."""
    import wandb

    offline = os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun")
    return not offline and not wandb.setup().settings.api_key and not wandb.api.api_key
