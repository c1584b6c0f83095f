"""What every way of training nested levels does: make them, and put the channels that matter first."""

from collections.abc import Sequence

import lightning as L

from elastic.errors import TrainingError
from elastic.levels.cutting import find_nestable
from elastic.levels.importance import Importance, rank_channels, score_channels
from elastic.levels.nested import Levels
from elastic.levels.sizes import By, level_sizes
from elastic.measure.machine import measure_latency_ms
from elastic.surgery.reindexing import reindex
from elastic.training.classifier import ElasticClassifier
from elastic.widths.discovery import discover

SAMPLES = 256  # training images that importance by gradients looks at


class TrainLevels(L.Callback):
    """Gives the network levels before anything is trained; abstract, see its subclasses.

    Args:
        levels: those below the network itself, ascending: fractions of the channels, or budgets.
        by: what `levels` are: fraction, macs or latency_ms (measured here, one image on the CPU).
        multiple: channels are rounded to a multiple of it.
        importance: which channels come first, see `elastic.importance.importance`.
    """

    def __init__(
        self, levels: Sequence[float], by: By = "fraction", multiple: int = 1, importance: Importance = "l2"
    ) -> None:
        self.levels, self.by, self.multiple, self.importance = list(levels), by, multiple, importance

    def check(self, trainer: L.Trainer) -> None:
        """What cannot be in one run with levels, refused before any process is started."""
        if trainer.world_size > 1:
            raise TrainingError("levels are trained in one process: set trainer.devices=1")
        refuse_beside(trainer, "levels")

    def setup(self, trainer: L.Trainer, pl_module: ElasticClassifier, stage: str) -> None:  # type: ignore[override]
        self.check(trainer)
        net, widths, example = pl_module.net, pl_module.widths, pl_module.example
        if pl_module.levels is None and trainer.ckpt_path is None:  # a checkpoint brings its own
            measure = (lambda cut: measure_latency_ms(cut, example)) if self.by == "latency_ms" else None
            sizes = level_sizes(net, widths, example, self.levels, self.by, self.multiple, measure)
            pl_module.nest(Levels(net, widths, sizes))
        if self.importance != "taylor":
            score_channels(net, widths, self.importance)  # what it refuses, it refuses now

    def order(self, trainer: L.Trainer, pl_module: ElasticClassifier, k: int) -> None:
        """Put the channels that matter most to level k first; level k - 1 starts from it."""
        levels = get_levels(pl_module)
        batches = None
        if self.importance == "taylor":
            x_BCHW, y_B = trainer.datamodule.sample(SAMPLES, pl_module.seed)  # type: ignore[attr-defined]
            batches = [(x_BCHW.to(pl_module.device), y_B.to(pl_module.device))]
        widths = discover(levels[k], pl_module.example)
        scores = score_channels(levels[k], widths, self.importance, batches)
        full = pl_module.widths.sizes()
        index = {n: rank_channels(scores[n], full[n]) for n in find_nestable(pl_module.widths)}
        with pl_module.changing():
            reindex(pl_module.net, pl_module.widths, index, optimizers=trainer.optimizers)
            levels.permute(index)
            levels.copy_norms(k - 1)


# What changes the network's structure, or keeps copies of it.
CHANGING = {"GrowOnSaturation", "PruneByGates", "PruneByMagnitude", "AverageWeights"}


def refuse_beside(trainer: L.Trainer, what: str) -> None:
    """Refuse a run in which the structure changes, for the sake of what needs it to stay."""
    changing = [type(c).__name__ for c in trainer.callbacks if type(c).__name__ in CHANGING]  # type: ignore[attr-defined]
    if changing:
        raise TrainingError(
            f"{what} and {changing[0]} cannot be in one run: run {changing[0]} first, and start from "
            "what it saved with init=<its folder>"
        )


def get_levels(pl_module: ElasticClassifier) -> Levels:
    assert pl_module.levels is not None
    return pl_module.levels
