"""The network prunes itself by gradient descent: gates, their penalty, and the channels they leave dead."""

from functools import partial
from typing import Any, Literal

import lightning as L
from elastic.callbacks.growth import refuse_growth_after

from elastic.errors import StructureError
from elastic.measure import counts
from elastic.pruning import gates, live
from elastic.pruning.budget import Budget
from elastic.pruning.compaction import find_removable_channels
from elastic.pruning.fitting import (
    check_budget_reachable,
    fit_gates_to_budget,
    measure_compacted,
    report_budget,
)
from elastic.pruning.gates import Grain
from elastic.training.classifier import ElasticClassifier

EVERY = 10  # steps between two looks at what is open
LEAST = 0.8  # of the size on the budget's path; below it, gates are opened again


class PruneByGates(L.Callback):
    """Gates the network and adds λ · Σ σ(score) to the loss; dead channels leave at the start of an epoch.

    Args:
        grain: one gate a "weight", "kernel" or "channel".
        penalty: λ, per parameter that a gate means to keep (for "macs": per average parameter).
        begin, end: parts of the run between which the penalty holds; then the gates are frozen.
        grace: epochs for which the gates of fresh channels are spared the penalty.
        by: what is to become small: "params", or "macs" (a weight then costs as often as it is used).
        budget: steers λ to this number of parameters or MACs (of weights that are not zero), and settles the
            gates on it when they are frozen; a number, or an `elastic.budget.Budget`.

    Where gates have shut far below the budget's path, or all of a layer, some are opened again.

    Example::

        PruneByGates(grain="weight", penalty=1e-4, budget=2000)
    """

    def __init__(
        self,
        grain: Grain = "weight",
        penalty: float = 1e-4,
        begin: float = 0.05,
        end: float = 0.85,
        grace: int = 2,
        by: Literal["params", "macs"] = "params",
        budget: Budget | float | None = None,
    ) -> None:
        if by not in ("params", "macs"):
            raise StructureError(f"gates cannot prune by '{by}': set by to params or macs")
        if not 0 <= begin < end <= 1 or penalty < 0 or grace < 0:
            raise StructureError(
                f"gates from {begin} to {end} of the run with λ {penalty} and grace {grace}: "
                "set 0 ≤ begin < end ≤ 1, penalty and grace to 0 or more"
            )
        self.grain, self.penalty, self.begin, self.end = grain, penalty, begin, end
        self.grace, self.by = grace, by
        self.budget = Budget(budget) if isinstance(budget, int | float) else budget
        self.frozen = False
        self.above = True  # the budget's path
        self.uses: dict[str, float] = {}  # of each weight, by layer

    def setup(self, trainer: L.Trainer, pl_module: ElasticClassifier, stage: str) -> None:  # type: ignore[override]
        attach_once(pl_module, self.grain, self.grace)

    def _price(self, pl_module: ElasticClassifier) -> None:
        """What a weight of each layer costs, relative to the average."""
        if self.by == "macs":
            self.uses = counts.count_macs_per_weight(pl_module.net, pl_module.example)
            average = sum(self.uses.values()) / len(self.uses)
            for path, _, gate in gates.iterate_gates(pl_module.net):
                gate.price = self.uses[path] / average

    def size(self, pl_module: ElasticClassifier) -> float:
        """What the budget is about, params or MACs, estimated from the gates: for every few steps."""
        if self.by == "macs":
            return live.count_live_macs(pl_module.net, pl_module.widths, self.uses)
        return live.count_live_params(pl_module.net, pl_module.widths)

    def on_fit_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        if self.budget is not None:
            check_budget(trainer, pl_module, self.budget.target, self.end, self.by)

    def on_train_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        self._price(pl_module)  # a run that goes on may settle before its first batch
        if self.frozen:
            with pl_module.changing():
                gates.freeze_gates(pl_module.net)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        net, epochs = pl_module.net, trainer.max_epochs or 1
        progress = trainer.current_epoch / epochs
        last = self.budget is not None and trainer.current_epoch + 1 >= epochs
        if (progress >= self.end or last) and not self.frozen:
            self.frozen = True
            with pl_module.changing():
                if self.budget is not None:  # its controller has come near to it
                    size = partial(measure_compacted, net, pl_module.example, self.by, trained=False)
                    fit_gates_to_budget(net, self.budget.target, gates.keep_best_gates, size)
                gates.freeze_gates(net)
        pl_module.loss_terms.pop("gates", None)
        if self.begin <= progress and not self.frozen:
            pl_module.loss_terms["gates"] = lambda *_: self.penalty * self.above * gates.compute_penalty(net)
        # Below the budget's path, gates have to re-open: what they have shut stays at hand.
        if self.above or self.frozen:
            remove_dead_channels(pl_module)

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ElasticClassifier, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # layers may have come since the last epoch
            self._price(pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        gates.advance_grace(pl_module.net)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: ElasticClassifier, *_: Any) -> None:  # type: ignore[override]
        pl_module.log("gates/penalty", self.penalty)
        if "gates" not in pl_module.loss_terms or trainer.global_step % EVERY:
            return
        least = 0.0
        if self.budget is not None:
            progress, size = trainer.global_step / trainer.estimated_stepping_batches, self.size(pl_module)
            self.penalty = self.budget.steer(self.penalty, size, progress)
            path = self.budget.path(progress)
            self.above = size > path
            if size < LEAST * path:
                least = gates.count_open(pl_module.net) * path / size
        gates.reopen_gates(pl_module.net, least)

    def report(self, pl_module: ElasticClassifier) -> dict[str, Any]:
        """The budget asked for and what was got; empty without one."""
        if self.budget is None:
            return {}
        return report_budget(pl_module.net, pl_module.example, self.budget.target, self.by)

    def state_dict(self) -> dict[str, Any]:
        budget = None if self.budget is None else dict(vars(self.budget))
        return {"penalty": self.penalty, "frozen": self.frozen, "above": self.above, "budget": budget}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.penalty, self.frozen = state_dict["penalty"], state_dict["frozen"]
        self.above = state_dict["above"]
        if self.budget is not None:
            vars(self.budget).update(state_dict["budget"])


# What every way of pruning by gates does.


def attach_once(pl_module: ElasticClassifier, grain: Grain, grace: int = 0) -> None:
    """Gate the network, unless an earlier fit has done so."""
    if not any(gates.iterate_gates(pl_module.net)):
        gates.attach_gates(pl_module.net, pl_module.widths, grain, grace)
        pl_module.lay_out()


def check_budget(
    trainer: L.Trainer, pl_module: ElasticClassifier, asked: int, end: float, aim: str = "params"
) -> None:
    """Refuse, before a run begins, a budget for `end` of it that cannot be met; see what it calls."""
    if trainer.ckpt_path is None:
        refuse_growth_after(end, trainer)
        check_budget_reachable(pl_module.net, pl_module.example, asked, aim)


def remove_dead_channels(pl_module: ElasticClassifier) -> None:
    """Remove the channels that gates have shut off, in all processes alike."""
    if keep := pl_module.agree(find_removable_channels(pl_module.net, pl_module.widths, pl_module.example)):
        pl_module.restructure(keep, "prune: channels without effect")
