"""Prune the network to a core, which is then frozen, and grow it back level by level."""

from collections.abc import Sequence
from typing import Any

import lightning as L

from elastic.callbacks.base import StepNetwork, list_static
from elastic.callbacks.levels import TrainLevels
from elastic.errors import TrainingError
from elastic.levels.freezing import FrozenPart, Phase, plan_phases
from elastic.ranges import Part, checked
from elastic.training.copies import look_for_copies

LONG = 1000  # epochs, in which each phase has some


@checked
class Reconstruct(TrainLevels):
    """Prune and grow, arXiv 2505.11569, with a core that is frozen to the last bit.

    Each phase ranks, trains and validates one level, with an optimizer and a learning rate schedule of its
    own. Channels that are grown back start from the values that they had when they were pruned.

    Args:
        dense, prune: parts of the run for the whole network, and for pruning step by step to the core; the
            rest grows back. Set `dense` to 0 for a network that is trained already.
        **levels: see `TrainLevels`.

    Raises:
        OptionError: a phase would have no epoch.
        TrainingError: a callback that holds on to weights as they were, or averages them.

    Example::

        Reconstruct([0.512, 0.64, 0.8], dense=0.4, prune=0.3)
    """

    def __init__(self, *args: Any, dense: Part = 0.4, prune: Part = 0.3, **levels: Any) -> None:
        super().__init__(*args, **levels)
        self.dense, self.prune = dense, prune
        self.phases: list[Phase] = []
        self.frozen_part: FrozenPart | None = None

    def list_step_networks(self) -> Sequence[StepNetwork]:
        """List the one level that is trained."""
        return [StepNetwork(self.levels[self.structure.level])]

    def check(self, trainer: L.Trainer) -> None:
        """Refuse what would mix the weights of a channel with those of another, ranked in its place later."""
        super().check(trainer)
        for callback in list_static(trainer):
            raise TrainingError(
                f"{type(callback).__name__} cannot follow channels that change places, as Reconstruct ranks "
                "them in the run: leave one of them out"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            look_for_copies(self.structure, pl_module)  # whose channels would change places alone
            # A look at one epoch (fast_dev_run) is one at the first phase.
            epochs = LONG if trainer.fast_dev_run else trainer.max_epochs or 1  # type: ignore[attr-defined]
            self.phases = plan_phases(len(self.fractions) + 1, epochs, self.dense, self.prune)
            if self.structure.levels is not None:
                self._enter(trainer, 0)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self.phases:  # its optimizer is made next
            self._enter(trainer, checkpoint["epoch"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == (phase := self._find_phase(trainer.current_epoch)).epochs.start:
            self._begin(trainer, pl_module, phase)
        elif self.frozen_part is None:  # the run was interrupted between two epochs
            self.frozen_part = FrozenPart(self.levels, phase)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.frozen_part is None:  # the run was interrupted in the middle of an epoch
            self.frozen_part = FrozenPart(self.levels, self._find_phase(trainer.current_epoch))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.frozen_part is not None
        self.frozen_part.restore()

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule, phase: Phase) -> None:
        """Begin a phase: rank the channels of the level to be cut, make an optimizer, freeze the rest."""
        structure, levels, epoch = self.structure, self.levels, trainer.current_epoch
        before = levels.sizes[self._find_phase(epoch - 1).level if epoch else -1]
        if phase.level < len(levels) - 1 and not phase.grown:
            self.rank_level(trainer, phase.level + 1)
        self._enter(trainer, epoch)
        self.frozen_part = FrozenPart(levels, phase)
        pl_module.zero_grad(set_to_none=True)  # of the level before
        trainer.strategy.setup_optimizers(trainer)
        structure.take_own_parameters()
        reason = f"{'grow' if phase.grown else 'prune'}: level {phase.level}"
        for name, size in levels.sizes[phase.level].items():
            if size != before[name]:
                structure.record(reason, width=name, before=before[name], after=size)

    def _enter(self, trainer: L.Trainer, epoch: int) -> None:
        phase = self._find_phase(epoch)
        self.structure.level = phase.level
        self.structure.schedule_fraction = len(phase.epochs) / (trainer.max_epochs or 1)

    def _find_phase(self, epoch: int) -> Phase:
        """Find the phase of an epoch; a run that has ended stays in its last."""
        return next((phase for phase in self.phases if epoch in phase.epochs), self.phases[-1])
