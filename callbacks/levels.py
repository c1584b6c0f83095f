"""Do what every way of training nested levels does: make them, and put the channels that matter first."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L

from elastic.callbacks.base import ElasticCallback, explain_order, refuse_changes_beside
from elastic.callbacks.dynamic import PruneDynamically
from elastic.errors import OptionError, TrainingError
from elastic.levels.importance import Importance, find_order, score_channels
from elastic.levels.nested import Levels
from elastic.levels.sensitivity import read_curves
from elastic.levels.sizes import By, check_levels, level_sizes
from elastic.measure.machine import measure_latency_ms
from elastic.ranges import Count, Positive, checked
from elastic.surgery.reindexing import reindex
from elastic.training.samples import check_loss, sample_batch

SAMPLES = 256  # training images that importance by gradients looks at


@checked
class TrainLevels(ElasticCallback):
    """Give the network levels before anything is trained; abstract, see its subclasses.

    Args:
        fractions: of the channels, for each level below the network itself, ascending; or budgets.
        by: what `fractions` are: fraction, macs or latency_ms (measured here, one image on the CPU).
        multiple: channels are rounded to a multiple of it.
        importance: which channels come first, see `elastic.levels.score_channels`.
        sensitivity: a file of `elastic sensitivity`, by which budgets are shared out among widths; all are
            cut by the same fraction by default.

    Raises:
        OptionError: levels that cannot be.
        TrainingError: several processes, or a network that changes, or gets modules, in the same run.
    """

    def __init__(
        self,
        fractions: Sequence[Positive],
        by: By = "fraction",
        multiple: Count = 1,
        importance: Importance = "l2",
        sensitivity: str | None = None,
    ) -> None:
        self.curves = None if sensitivity is None else read_curves(Path(sensitivity))
        check_levels(fractions, by, multiple, self.curves)
        self.fractions, self.by, self.multiple = list(fractions), by, multiple
        self.importance = importance

    def check(self, trainer: L.Trainer) -> None:
        """Refuse what cannot be in one run with levels, before any process is started."""
        if trainer.world_size > 1:
            raise TrainingError("levels are trained in one process: set trainer.devices=1")
        refuse_changes_beside(trainer, "levels")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, TrainLevels) for callback in callbacks) > 1:
            raise OptionError("levels are trained jointly or by reconstruction: choose one of the schedules")
        if any(isinstance(callback, PruneDynamically) for callback in callbacks):
            # Either would train the level that it draws, in place of the other's.
            raise explain_order(type(self).__name__, PruneDynamically.__name__)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.structure.dynamic_nets and self.structure.levels is None:
            raise explain_order(type(self).__name__, PruneDynamically.__name__)
        with self.structure.showing_gates():  # of an earlier fit, which levels refuse
            self._nest(trainer)

    def _nest(self, trainer: L.Trainer) -> None:
        structure = self.structure
        net, widths, example = structure.net, structure.widths, structure.example
        if structure.levels is None and trainer.ckpt_path is None:  # a checkpoint brings its own
            measure = (lambda level: measure_latency_ms(level, example)) if self.by == "latency_ms" else None
            sizes = level_sizes(
                net, widths, example, self.fractions, self.by, self.multiple, measure, self.curves
            )
            structure.nest(Levels(net, widths, sizes))
        if self.importance != "taylor":
            score_channels(net, widths, self.importance)  # what it refuses, it refuses now

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.importance == "taylor":
            check_loss(trainer, self.structure)  # which is needed when much has been trained

    @property
    def levels(self) -> Levels:
        """Return the levels of the network, once there are any."""
        assert self.structure.levels is not None
        return self.structure.levels

    def rank_level(self, trainer: L.Trainer, k: int) -> None:
        """Put the channels that matter most to level k first; level k - 1 starts from it."""
        structure, levels = self.structure, self.levels
        batches = [sample_batch(trainer, SAMPLES, structure.seed)] if self.importance == "taylor" else None
        example, loss = structure.example, structure.compute_loss
        index = find_order(levels, k, example, self.importance, batches, loss)
        with structure.changing():
            reindex(
                structure.net,
                structure.widths,
                index,
                optimizers=trainer.optimizers,
                copies=structure.copies,
            )
            levels.permute(index)
            levels.copy_norms(k - 1)
