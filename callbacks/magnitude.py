"""Close the smallest weights step by step: the control for learned gates."""

from collections.abc import Mapping
from typing import Any

import lightning as L

from elastic.callbacks.base import ElasticCallback, list_elastic
from elastic.callbacks.gates import PruneByGates
from elastic.callbacks.pruning import attach_once, check_budget, remove_dead_channels
from elastic.errors import TrainingError
from elastic.pruning.budget import Budget
from elastic.pruning.fitting import (
    fit_gates_to_budget,
    keep_largest_weights,
    measure_compacted,
    report_budget,
)
from elastic.pruning.gates import freeze_gates
from elastic.pruning.live import count_live_params
from elastic.ranges import Part, checked
from elastic.training.progress import ends_within_epoch, is_last_epoch, measure_epoch_progress


@checked
class PruneByMagnitude(ElasticCallback):
    """Prune gradually by magnitude (Zhu & Gupta, arXiv 1710.01878), ranked over all layers at once.

    At the start of an epoch the smallest |w| are closed, until the network has the parameters that a cubic
    path allows: from all it has at `begin` to `budget` at `end`, or in the last epoch where that comes first;
    there the network is compacted to count them. What is closed stays closed, by gates that nothing trains;
    the weights that stay go on learning. Dead channels leave as in `PruneByGates`. A network that grows
    should have grown before `begin`: fresh weights of zero are the smallest there are.

    Args:
        budget: parameters (scalars that are not zero) of the compacted network.
        begin, end: parts of the run.

    Raises:
        OptionError: a budget or a path that cannot be.
        TrainingError: `PruneByGates` prunes the same network.

    Example::

        PruneByMagnitude(budget=2000, begin=0.2, end=0.75)
    """

    changes_structure = True

    def __init__(self, budget: int, begin: Part = 0.2, end: Part = 0.75) -> None:
        self.budget = Budget(budget, begin, end)
        self.is_done = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if any(isinstance(other, PruneByGates) for other in list_elastic(trainer)):
            raise TrainingError(
                "the network is pruned by gates and by magnitude: leave one of them out of the schedule"
            )

    def attach(self) -> None:
        """Gate the network, for good."""
        attach_once(self.structure, "weight")
        freeze_gates(self.structure.net)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        check_budget(trainer, self.structure, self.budget.target, self.budget.end)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        progress = measure_epoch_progress(trainer)
        is_last = progress >= self.budget.end or is_last_epoch(trainer)
        if not self.is_done and (is_last or progress >= self.budget.begin):
            self.is_done = is_last
            self._prune(progress)
        remove_dead_channels(self.structure)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.is_done and ends_within_epoch(trainer, self.budget.end):
            self.is_done = True
            self._prune(1.0)

    def _prune(self, progress: float) -> None:
        # On the way there the gates tell the size, ten times as fast as compaction.
        measure = self.measure_exactly if self.is_done else self.measure_size
        size = measure()
        self.budget.peak = self.budget.peak or size
        target = self.budget.path(1.0 if self.is_done else progress)
        if size > target:
            with self.structure.changing():
                fit_gates_to_budget(self.structure.net, target, keep_largest_weights, measure)

    def measure_size(self) -> int:
        """Count the network's parameters as its gates tell them."""
        return count_live_params(self.structure.net, self.structure.widths)

    def measure_exactly(self) -> int:
        """Count the parameters of the network as compaction would leave it."""
        return measure_compacted(self.structure.net, self.structure.example, count_zeros=True)

    def report(self) -> Mapping[str, Any]:
        """Return the budget and what has become of it, both in params."""
        return report_budget(self.structure.net, self.structure.example, self.budget.target)

    def state_dict(self) -> dict[str, Any]:
        return {"is_done": self.is_done, "budget": dict(vars(self.budget))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.is_done = state_dict["is_done"]
        vars(self.budget).update(state_dict["budget"])
