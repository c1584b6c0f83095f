"""Make the parts of a run that its configuration names and that something has to be said of."""

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from elastic.errors import OptionError
from elastic.experiments.tools.composition import list_callbacks


def make_callbacks(cfg: DictConfig) -> list[L.Callback]:
    """Make the callbacks of a run; the learning rate is watched where there is a logger to tell."""
    has_logger = bool(cfg.get("logger"))
    nodes = list_callbacks(cfg).items()
    return [instantiate(node) for name, node in nodes if has_logger or name != "learning_rate"]


def make_loggers(cfg: DictConfig) -> list[Logger]:
    """Make all that a run is logged to.

    Raises:
        OptionError: a package is missing.
    """
    return [make_logger(name, node) for name, node in (cfg.get("logger") or {}).items()]


def make_logger(name: str, node: DictConfig) -> Logger:
    """Make one of them; see `make_loggers`."""
    try:
        logger: Logger = instantiate(node)
    except InstantiationException as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        raise OptionError(
            f"logger={name} needs a package that is not installed: pip install 'elastic-cnn[{name}]'"
        ) from error
    return logger
