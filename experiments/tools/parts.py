"""Make the parts of a run that its configuration names and that something has to be said of."""

import os
from collections.abc import Callable

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from elastic.errors import OptionError, cite
from elastic.experiments.tools.composition import list_callbacks
from elastic.training.schedules import Scheduler, make_schedule
from elastic.training.tasks import Task


def make_callbacks(cfg: DictConfig) -> dict[str, L.Callback]:
    """Make the callbacks of a run, by their names; learning rates are watched where a logger is told.

    Raises:
        OptionError: one of them is none.
    """
    callbacks = {}
    for name, node in list_callbacks(cfg).items():
        if name == "learning_rate" and not cfg.get("logger"):
            continue
        # Lists as such: a trigger's attributes are in checkpoints, which hold plain containers.
        callback = instantiate(node, _convert_="all")
        if not isinstance(callback, L.Callback):
            raise OptionError(f"callbacks.{name} names {node.get('_target_')}, which is no callback")
        callbacks[name] = callback
    return callbacks


def make_recipe(cfg: DictConfig) -> tuple[Callable[..., Optimizer], Callable[..., Scheduler] | None]:
    """Make what makes a run's optimizer and its scheduler, after trying both on a parameter.

    Raises:
        OptionError: an option that one of them does not take.
    """
    optimizer, scheduler = instantiate(cfg.optimizer), instantiate(cfg.get("lr_scheduler"))
    part = "optimizer"
    is_gpu = torch.cuda.is_available() and cfg.trainer.accelerator != "cpu"
    parameter = nn.Parameter(torch.zeros(1, device="cuda" if is_gpu else "cpu"))
    parameter.grad = torch.zeros_like(parameter)
    try:
        trial = optimizer([parameter])
        trial.step(lambda: parameter.sum())
        part = "lr_scheduler"
        if scheduler is not None:
            make_schedule(scheduler, trial, steps=1000, batches=10)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        cause = cite(error).removesuffix(".")
        raise OptionError(f"{part}: {cause}: change its options, or choose another {part}") from error
    return optimizer, scheduler


def make_task(cfg: DictConfig, classes: int) -> Task:
    """Make the task of a run.

    Raises:
        OptionError: what the configuration names is none.
    """
    task = instantiate(cfg.task, classes=classes)
    if not isinstance(task, Task):
        raise OptionError(
            f"task._target_={cfg.task.get('_target_')} makes no task: name a subclass of "
            "elastic.training.tasks.Task"
        )
    return task


def make_loggers(cfg: DictConfig) -> list[Logger]:
    """Make all that a run is logged to.

    Raises:
        OptionError: a package is missing, or an account.
    """
    nodes = (cfg.get("logger") or {}).items()
    return [make_logger(name, node) for name, node in nodes if node is not None]


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
