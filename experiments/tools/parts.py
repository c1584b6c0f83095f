"""Make the parts of a run that its configuration names and that something has to be said of."""

from collections.abc import Callable

import lightning as L
import torch
from hydra.utils import instantiate
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
