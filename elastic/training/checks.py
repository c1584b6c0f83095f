"""Refuse, before anything is trained, a run whose result would be lost, or not be what it seems."""

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from elastic.errors import TrainingError
from elastic.pruning.gates import iterate_gates
from elastic.training.kinds import is_kind
from elastic.training.structure import Structure

SHARDED = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


def check_whole(trainer: L.Trainer) -> None:
    """Refuse strategies by which no process holds a whole network.

    Raises:
        TrainingError: the run's is one.
    """
    strategy = trainer.strategy
    if any(is_kind(strategy, kind) for kind in SHARDED):
        raise TrainingError(
            f"{type(strategy).__name__} shares out a network among processes, of which none could change it: "
            "set strategy='ddp'"
        )


def check_current(structure: Structure, module: nn.Module) -> None:
    """Refuse a network that a program has made anew, or changed, since its widths were found.

    Raises:
        TrainingError: it has.
    """
    if not structure.is_current(module):
        raise TrainingError(
            f"'{structure.path}' is no longer the network that callbacks have found: make it as it is to be "
            "in __init__, not in setup or configure_model"
        )


def check_changeable(structure: Structure, method: str) -> None:
    """Refuse a method that changes the network where an earlier run has given it what could not follow.

    Raises:
        TrainingError: it has levels, or kernel activation modules.
    """
    parts = "levels" if structure.levels is not None else "kernel activation modules"
    if structure.levels is not None or structure.dynamic_nets:
        raise TrainingError(
            f"the network has {parts}, which would not follow what {method} changes: run {method} first, "
            "in a module without them"
        )


def check_returned(trainer: L.Trainer) -> None:
    """Refuse processes that give back weights alone, for a network that by then is not as it was.

    The process that starts them would load those weights into the network as it began, or leave them out.

    Raises:
        TrainingError: the run is carried out in such processes.
    """
    if is_kind(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise TrainingError(
            "processes that are forked or spawned take a changed network along as they end: set "
            "strategy='ddp', or devices=1 in a notebook"
        )


def check_saved(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse hyperparameters that checkpoints cannot hold, since torch does not pickle gates.

    Raises:
        TrainingError: one is a network with gates.
    """
    for name, value in module.hparams.items():
        if trainer.checkpoint_callbacks and isinstance(value, nn.Module) and any(iterate_gates(value)):
            raise TrainingError(
                f"checkpoints cannot hold the hyperparameter '{name}', a network with gates: call "
                f"save_hyperparameters(ignore=['{name}'])"
            )
