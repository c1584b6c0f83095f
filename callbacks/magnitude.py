"""The control for learned gates: the smallest weights are closed, step by step."""

from math import inf
from typing import Any

import lightning as L
from elastic.callbacks.gates import PruneByGates, attach_once, check_budget, remove_dead_channels

from elastic.errors import TrainingError
from elastic.pruning import gates, live
from elastic.pruning.budget import Budget
from elastic.pruning.fitting import (
    fit_gates_to_budget,
    keep_largest_weights,
    measure_compacted,
    report_budget,
)
from elastic.training.classifier import ElasticClassifier


class PruneByMagnitude(L.Callback):
    """Gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878), ranked over all layers at once.

    At the start of an epoch the smallest |w| are closed, until the network has the parameters that a cubic
    path allows: from all it has at `begin` to `budget` at `end`, or in the last epoch where that comes first;
    there the network is compacted to count them. What is closed stays closed, by gates that nothing trains;
    the weights that stay go on learning. Dead channels leave as in `PruneByGates`. A network that grows
    should have grown before `begin`: fresh weights of zero are the smallest there are.

    Args:
        budget: parameters (scalars that are not zero) of the compacted network.
        begin, end: parts of the run.

    Raises:
        StructureError: a budget or a path that cannot be.
        TrainingError: `PruneByGates` prunes the same network.

    Example::

        PruneByMagnitude(budget=2000, begin=0.2, end=0.75)
    """

    def __init__(self, budget: float, begin: float = 0.2, end: float = 0.75) -> None:
        self.budget = Budget(budget, begin, end, headroom=inf)  # the path falls from the full size
        self.done = False

    def setup(self, trainer: L.Trainer, pl_module: ElasticClassifier, stage: str) -> None:  # type: ignore[override]
        if any(isinstance(other, PruneByGates) for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise TrainingError(
                "the network is pruned by gates and by magnitude: leave one of them out of the schedule"
            )
        attach_once(pl_module, "weight")
        gates.freeze_gates(pl_module.net)

    def size(self, pl_module: ElasticClassifier) -> int:
        """The network's parameters as its gates tell them: for the steps on the way, ten times as fast."""
        return live.count_live_params(pl_module.net, pl_module.widths)

    def measure(self, pl_module: ElasticClassifier) -> int:
        """The same, of the network as compaction would leave it."""
        return measure_compacted(pl_module.net, pl_module.example, trained=False)

    def on_fit_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        check_budget(trainer, pl_module, self.budget.target, self.budget.end)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        net, epoch, epochs = pl_module.net, trainer.current_epoch, trainer.max_epochs or 1
        progress = epoch / epochs
        last = progress >= self.budget.end or epoch + 1 >= epochs
        if not self.done and (last or progress >= self.budget.begin):
            self.done = last
            measure = self.measure if last else self.size
            size = measure(pl_module)
            self.budget.peak = self.budget.peak or size
            allowed = self.budget.path(1.0 if last else progress)
            if size > allowed:
                with pl_module.changing():
                    fit_gates_to_budget(net, allowed, keep_largest_weights, lambda: measure(pl_module))
        remove_dead_channels(pl_module)

    def report(self, pl_module: ElasticClassifier) -> dict[str, Any]:
        """The budget asked for and what was got, both in params."""
        return report_budget(pl_module.net, pl_module.example, self.budget.target)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "budget": dict(vars(self.budget))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = state_dict["done"]
        vars(self.budget).update(state_dict["budget"])
