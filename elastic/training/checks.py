"""Refuse, before anything is trained, a run whose result would be lost, or not be what it seems."""

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from elastic.errors import TrainingError
from elastic.pruning.gates import iterate_gates
from elastic.training.kinds import is_kind

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
