"""Connect a callback to the structure of the network that it is about, and ask callbacks what they answer."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn

from elastic.errors import TrainingError
from elastic.training.checks import (
    check_changeable,
    check_current,
    check_returned,
    check_saved,
    check_whole,
)
from elastic.training.copies import look_for_copies
from elastic.training.failures import explain_failure
from elastic.training.joining import find_structure, join_structure
from elastic.training.kinds import is_kind
from elastic.training.own_parameters import check_followed
from elastic.training.progress import continues
from elastic.training.restarts import end_epoch_once, reopen_last_batch
from elastic.training.steps import get_scaler
from elastic.training.structure import Structure
from elastic.widths.inputs import Example

# Lightning's own callbacks that hold on to parameters, or copies of them, as they were.
STATIC = (StochasticWeightAveraging, WeightAveraging, BaseFinetuning, ModelPruning)


@dataclass(frozen=True)
class StepNetwork:
    """Name a network that a training step executes, for the count of what training takes.

    Attributes:
        times: how often, on average over steps.
        trained: whether gradients go through it.
    """

    net: nn.Module
    times: float = 1.0
    trained: bool = True


class ElasticCallback(L.Callback):
    """Follow the structure of any LightningModule's network.

    The first such callback of a run makes the `Structure`, and sees to what is common to all. A callback asks
    the structure, and answers questions; it writes into no attribute of the user's module.

    Attributes:
        changes_structure: whether the network's parameters may change their shapes; levels and kernel
            activation modules need a network that stays as it is.
        averages_weights: whether a copy of the network stands in for it in validation, which has neither
            levels nor modules, and which nothing else may do at once.
    """

    changes_structure: ClassVar[bool] = False
    averages_weights: ClassVar[bool] = False
    structure: Structure
    _own_states: Sequence[dict[str, Any]] | None = None
    _first_state: dict[str, Any] | None = None

    # Questions.

    def attach(self) -> None:
        """Attach what the network is trained with, once optimizers exist."""

    def compute_loss(self, output: Any, *inputs: Any, **named: Any) -> Tensor | None:
        """Return what a call of the network in training, with these inputs, adds to the loss, if anything."""
        return None

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add gradients that need no loss to those among the parameters, which are about to be stepped."""

    def list_step_networks(self) -> Sequence[StepNetwork]:
        """List what a training step executes, in place of the network once; empty where that is so."""
        return ()

    def check(self, trainer: L.Trainer) -> None:
        """Refuse what cannot be in one run with this callback, before any process is started."""

    def find_last_growth(self, trainer: L.Trainer) -> float:
        """Return the part of the run after which this callback lets nothing grow."""
        return 0.0

    def report(self) -> Mapping[str, Any]:
        """Return entries for the run's summary."""
        return {}

    # Hooks.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.structure = join_structure(trainer, pl_module)
        if stage == "fit":
            self._start_anew(trainer)
        if stage == "fit" and self._leads(trainer):
            self.structure.hide_gates()
            for callback in list_elastic(trainer):
                callback.check(trainer)
            check_whole(trainer)
        self._refuse_static(trainer)

    def _refuse_static(self, trainer: L.Trainer) -> None:
        """Refuse Lightning's own callbacks that hold on to the network, where that changes or is replaced."""
        static = list_static(trainer)
        if static and self.changes_structure:
            raise TrainingError(
                f"{type(static[0]).__name__} cannot follow a network that changes, as "
                f"{type(self).__name__} needs it to: leave one of them out (AverageWeights follows)"
            )
        if static and self.averages_weights:
            raise TrainingError(
                f"{type(static[0]).__name__} and {type(self).__name__} would each replace the network's "
                "weights by others: leave one of them out"
            )

    def _start_anew(self, trainer: L.Trainer) -> None:
        """Forget an earlier fit, unless this one goes on with it."""
        if self._first_state is None:
            self._first_state = deepcopy(self.state_dict())
        elif not continues(trainer):
            self.load_state_dict(deepcopy(self._first_state))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._leads(trainer):
            check_current(self.structure, pl_module)
            for callback in list_changing(trainer):
                check_changeable(self.structure, type(callback).__name__)
            if list_changing(trainer):
                look_for_copies(self.structure, pl_module)
            self._attach_all(trainer)
            self._check_result(trainer, pl_module)
            self._take_own_parameters(trainer)
            self._route(trainer)

    def _attach_all(self, trainer: L.Trainer) -> None:
        with self.structure.changing():
            self.structure.show_gates()
            for callback in list_elastic(trainer):
                callback.attach()

    def _check_result(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if list_changing(trainer) or self.structure.list_own_parameters():
            check_returned(trainer)
        check_saved(trainer, module)

    def _take_own_parameters(self, trainer: L.Trainer) -> None:
        if list_changing(trainer):
            for optimizer in trainer.optimizers:
                check_followed(optimizer)
        self.structure.step_own = partial(self._step_own, trainer)
        self.structure.take_own_parameters()
        if self._own_states:  # none where the network had nothing of the kind when it was saved
            self.structure.own.load_state_dict(self._own_states)
        self._own_states = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._leads(trainer):
            end_epoch_once(trainer)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._leads(trainer):
            self.structure.check_called()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._route(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._route(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._route(trainer)

    def _step_own(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
        own = self.structure.own
        parameters = own.list_parameters(optimizer)
        finite = own.unscale(optimizer, get_scaler(trainer))
        # Before the penalty comes, which is not the task's: a budget's λ would be steered in vain.
        own.clip(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        for callback in list_elastic(trainer):
            callback.add_gradients(parameters)
        own.step(optimizer, skip=not finite)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        structure = find_structure(pl_module)
        if structure is not None and self._leads(trainer):  # there is none where a run is refused, and saved
            checkpoint["elastic"] = {"own_optimizers": structure.own.state_dict()}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._leads(trainer) and trainer.state.fn == "fit":
            self._own_states = checkpoint.get("elastic", {}).get("own_optimizers")
            reopen_last_batch(checkpoint)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._leads(trainer):
            self.structure.release()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave the network with its gates, and as `teardown` does, which Lightning then leaves out."""
        structure = find_structure(pl_module)
        if structure is not None:
            if self._leads(trainer):
                explain_failure(exception, structure)
            structure.show_gates()
            structure.release()

    def _leads(self, trainer: L.Trainer) -> bool:
        """Tell whether this is the callback that sees to what is common to all."""
        return next(iter(list_elastic(trainer)), None) is self

    def _route(self, trainer: L.Trainer) -> None:
        if self._leads(trainer):
            answering = [
                c for c in list_elastic(trainer) if type(c).compute_loss is not ElasticCallback.compute_loss
            ]
            self.structure.route([callback.compute_loss for callback in answering])


class FollowNetwork(ElasticCallback):
    """Name the network that is to be elastic, where a module has several children; put it first.

    Args:
        network: its path in the module, say "backbone" or "model.encoder".
        example: an input of it, batch first, or several, where the module's own forward does not lead to it.
        loss: what its channels are judged by where gradients decide (GradMax, importance "taylor"): takes
            the network's outputs and the targets of a batch; the cross entropy of classes by default.
        copies: the paths of networks that the program keeps in step with it (momentum encoders, target
            networks); they follow each change of it.

    Example::

        trainer = L.Trainer(callbacks=[FollowNetwork("backbone"), PruneByGates(budget=100_000)])
    """

    def __init__(
        self,
        network: str,
        example: Example | None = None,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        copies: Sequence[str] = (),
    ) -> None:
        self.network, self.example, self.loss, self.copies = network, example, loss, copies

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        structure = join_structure(trainer, pl_module, self.network, self.example)
        structure.compute_loss = self.loss or structure.compute_loss
        structure.follow_copies(pl_module, self.copies)
        super().setup(trainer, pl_module, stage)


def list_elastic(trainer: L.Trainer) -> list[ElasticCallback]:
    """List the callbacks of a run that follow its network."""
    return [callback for callback in trainer.callbacks if isinstance(callback, ElasticCallback)]  # type: ignore[attr-defined]


def list_changing(trainer: L.Trainer) -> list[ElasticCallback]:
    """List the callbacks of a run that may change the shapes of its network's parameters."""
    return [callback for callback in list_elastic(trainer) if callback.changes_structure]


def list_static(trainer: L.Trainer) -> list[L.Callback]:
    """List the callbacks of a run that hold on to parameters as they were."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    static = [callback for callback in callbacks if any(is_kind(callback, kind) for kind in STATIC)]
    return [callback for callback in static if not isinstance(callback, ElasticCallback)]


def explain_order(first: str, then: str) -> TrainingError:
    """Make the error for two methods of which the second starts from what the first has saved."""
    return TrainingError(
        f"{then} and {first} cannot be in one run: run {first} first, and start from what it saved with "
        "init=<its folder>"
    )


def refuse_changes_beside(trainer: L.Trainer, method: str) -> None:
    """Refuse a run in which the structure changes, for the sake of what needs it to stay.

    Raises:
        TrainingError: a callback changes it, or averages it as one network.
    """
    for callback in list_elastic(trainer):
        if callback.averages_weights:
            name = type(callback).__name__
            raise TrainingError(
                f"{method} and {name} cannot be in one run, since {name} averages one network that runs "
                f"whole: leave {name} out"
            )
    if changing := list_changing(trainer):
        raise explain_order(type(changing[0]).__name__, method)
