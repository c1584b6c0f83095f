"""The network is pruned to a core, which is then frozen, and grown back around it level by level."""

from typing import Any

import lightning as L
from elastic.callbacks.levels import TrainLevels, get_levels

from elastic.levels.freezing import FrozenPart, Phase, plan_phases
from elastic.training.classifier import ElasticClassifier


class Reconstruct(TrainLevels):
    """Prune-and-grow, arXiv 2505.11569, with a core that is frozen to the last bit: `elastic.reconstruct`.

    Each phase orders, trains and validates one level, with an optimizer and a learning rate schedule of its
    own. Channels that are grown back start from the values that they had when they were pruned.

    Args:
        dense, prune: parts of the run for the whole network, and for pruning step by step to the core; the
            rest grows back. Set `dense` to 0 for a network that is trained already.
        **nest: see `TrainLevels`.

    Example::

        Reconstruct([0.512, 0.64, 0.8], dense=0.4, prune=0.3)
    """

    def __init__(self, *args: Any, dense: float = 0.4, prune: float = 0.3, **nest: Any) -> None:
        super().__init__(*args, **nest)
        self.dense, self.prune = dense, prune
        self.phases: list[Phase] = []
        self.frozen: FrozenPart | None = None

    def setup(self, trainer: L.Trainer, pl_module: ElasticClassifier, stage: str) -> None:  # type: ignore[override]
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.phases = plan_phases(
                len(self.fractions) + 1, trainer.max_epochs or 1, self.dense, self.prune
            )
            if pl_module.levels is not None:
                self._enter(trainer, pl_module, 0)

    def on_load_checkpoint(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ElasticClassifier, checkpoint: dict[str, Any]
    ) -> None:
        if self.phases:  # its optimizer is made next
            self._enter(trainer, pl_module, checkpoint["epoch"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        if trainer.current_epoch == (phase := self._phase(trainer.current_epoch)).epochs.start:
            self._begin(trainer, pl_module, phase)
        elif self.frozen is None:  # the run was interrupted
            self.frozen = self._freeze(pl_module, phase)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: ElasticClassifier, *_: Any) -> None:  # type: ignore[override]
        assert self.frozen is not None
        self.frozen.restore()

    def _begin(self, trainer: L.Trainer, pl_module: ElasticClassifier, phase: Phase) -> None:
        levels = get_levels(pl_module)
        epoch = trainer.current_epoch
        before = levels.sizes[self._phase(epoch - 1).level if epoch else -1]
        if phase.level < len(levels) - 1 and not phase.grown:
            self.order(trainer, pl_module, phase.level + 1)
        self._enter(trainer, pl_module, epoch)
        self.frozen = self._freeze(pl_module, phase)
        pl_module.zero_grad(set_to_none=True)  # of the level before
        trainer.strategy.setup_optimizers(trainer)
        place = {"epoch": epoch, "step": trainer.global_step}
        why = f"{'grow' if phase.grown else 'prune'}: level {phase.level}"
        for name, size in levels.sizes[phase.level].items():
            if size != before[name]:
                pl_module.timeline.append(
                    {**place, "why": why, "width": name, "before": before[name], "after": size}
                )

    def _enter(self, trainer: L.Trainer, pl_module: ElasticClassifier, epoch: int) -> None:
        phase = self._phase(epoch)
        pl_module.level = phase.level
        pl_module.executed = [(get_levels(pl_module)[phase.level], 1.0)]
        pl_module.share = len(phase.epochs) / (trainer.max_epochs or 1)

    def _phase(self, epoch: int) -> Phase:
        return next(phase for phase in self.phases if epoch in phase.epochs)

    def _freeze(self, pl_module: ElasticClassifier, phase: Phase) -> FrozenPart:
        return FrozenPart(get_levels(pl_module), phase)
