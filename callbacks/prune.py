"""The network prunes itself by gradient descent: gates, their penalty, and the channels they leave dead."""

from typing import Any, Literal

import lightning as L

from elastic import gates
from elastic.budget import Budget
from elastic.compact import silent
from elastic.cost import macs_by_layer, params
from elastic.gates import Grain
from elastic.module import ElasticModule
from elastic.stored import original

EVERY = 10  # steps between two looks of the budget controller


class PruneByGates(L.Callback):
    """Gates the network and adds λ · Σ σ(score) to the loss; dead channels leave at the start of an epoch.

    Args:
        grain: one gate a "weight", "kernel" or "channel".
        weight: λ, per parameter that a gate means to keep (per MAC, relative to the average, for "macs").
        begin, end: parts of the run between which the penalty holds; then the gates are frozen.
        grace: epochs for which the gates of fresh channels are spared the penalty.
        aim: what is to become small.
        budget: steers λ to a number of parameters, see `elastic.budget.Budget`.

    Example::

        PruneByGates(grain="weight", weight=1e-4)
    """

    def __init__(
        self,
        grain: Grain = "weight",
        weight: float = 1e-4,
        begin: float = 0.05,
        end: float = 0.85,
        grace: int = 2,
        aim: Literal["params", "macs"] = "params",
        budget: Budget | None = None,
    ) -> None:
        self.grain, self.weight, self.begin, self.end = grain, weight, begin, end
        self.grace, self.aim, self.budget = grace, aim, budget
        self.frozen = False

    def setup(self, trainer: L.Trainer, pl_module: ElasticModule, stage: str) -> None:  # type: ignore[override]
        if any(gates.gated(pl_module.net)):
            return
        gates.attach(pl_module.net, pl_module.widths, self.grain, self.grace)
        if self.aim == "macs":
            self._price_macs(pl_module)

    def _price_macs(self, pl_module: ElasticModule) -> None:
        """A weight costs the positions at which it is used, relative to the network's average."""
        macs = macs_by_layer(pl_module.net, pl_module.example)
        gated = list(gates.gated(pl_module.net))
        sizes = {path: original(layer, "weight").numel() for path, layer, _ in gated}  # type: ignore[union-attr]
        average = sum(macs[path] for path in sizes) / sum(sizes.values())
        for path, _, gate in gated:
            gate.price = macs[path] / sizes[path] / average

    def on_train_start(self, trainer: L.Trainer, pl_module: ElasticModule) -> None:  # type: ignore[override]
        if self.frozen:
            gates.freeze(pl_module.net)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: ElasticModule) -> None:  # type: ignore[override]
        net, progress = pl_module.net, trainer.current_epoch / (trainer.max_epochs or 1)
        gates.age(net)
        if progress >= self.end and not self.frozen:
            self.frozen = True
            if self.budget is not None:
                gates.settle(net, self.budget.asked - params(net) + gates.count(net))
            gates.freeze(net)
        active = self.begin <= progress and not self.frozen
        pl_module.loss_terms.pop("gates", None)
        if active:
            pl_module.loss_terms["gates"] = lambda: self.weight * gates.penalty(net)
        if keep := silent(net, pl_module.widths, pl_module.example):
            pl_module.restructure(keep, "prune: channels without effect")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: ElasticModule, *_: Any) -> None:  # type: ignore[override]
        if self.budget is None or "gates" not in pl_module.loss_terms or trainer.global_step % EVERY:
            return
        progress = trainer.global_step / trainer.estimated_stepping_batches
        self.weight = self.budget.steer(self.weight, params(pl_module.net), progress)

    def state_dict(self) -> dict[str, Any]:
        budget = None if self.budget is None else dict(vars(self.budget))
        return {"weight": self.weight, "frozen": self.frozen, "budget": budget}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weight, self.frozen = state_dict["weight"], state_dict["frozen"]
        if self.budget is not None:
            vars(self.budget).update(state_dict["budget"])
