"""Let the network prune itself by gradient descent: gates, their penalty, channels that they leave dead."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch import nn

from elastic.callbacks.base import ElasticCallback
from elastic.callbacks.pruning import attach_once, check_budget, remove_dead_channels
from elastic.errors import OptionError
from elastic.measure.counts import count_macs_per_weight
from elastic.pruning.budget import Budget
from elastic.pruning.fitting import fit_gates_to_budget, measure_compacted, report_budget
from elastic.pruning.gates import (
    Gate,
    Grain,
    advance_grace,
    count_open,
    form_blocks,
    freeze_gates,
    iterate_gates,
)
from elastic.pruning.live import count_live_macs, count_live_params
from elastic.pruning.penalty import add_penalty_gradient, set_prices
from elastic.pruning.ranking import keep_best_gates, reopen_gates
from elastic.ranges import Count, Natural, NotNegative, Part, checked
from elastic.training.progress import (
    ends_within_epoch,
    is_last_epoch,
    measure_epoch_progress,
    measure_step_progress,
)

EVERY = 10  # batches between two looks at what is open
LEAST = 0.8  # of the size on the budget's path; below it, gates are opened again


@checked
class PruneByGates(ElasticCallback):
    """Gate the network and penalise open gates; dead channels leave at the start of an epoch.

    The penalty λ · Σ σ(score) enters by its gradient, so that the loss stays the user's own.

    Args:
        grain: one gate a "weight", "kernel", "block" (the kernels of 8 outputs for one input, which
            `make_skipping` leaves out together) or "channel".
        penalty: λ, per parameter that a gate means to keep (for "macs": per average parameter).
        begin, end: parts of the run between which the penalty holds; then the gates are frozen.
        grace: epochs for which the gates of fresh channels are spared the penalty.
        by: what is to become small: "params", or "macs" (a weight then costs as often as it is used).
        budget: steers λ to this number of parameters or MACs (of weights that are not zero), and fits the
            gates to it when they are frozen; a number, or an `elastic.Budget`.
        remove_every: epochs between two removals of channels that gates have shut off; where the network is
            compiled, each removal costs a compilation.

    Where gates have shut far below the budget's path, or all of a layer, some are opened again.

    Raises:
        OptionError: options that cannot be, or a budget that cannot be reached, found before training.

    Example::

        PruneByGates(grain="weight", penalty=1e-4, budget=2000)
    """

    changes_structure = True

    def __init__(
        self,
        grain: Grain = "weight",
        penalty: NotNegative = 1e-4,
        begin: Part = 0.05,
        end: Part = 0.85,
        grace: Natural = 2,
        by: Literal["params", "macs"] = "params",
        budget: Budget | int | None = None,
        remove_every: Count = 1,
    ) -> None:
        if by not in ("params", "macs"):
            raise OptionError(f"gates cannot prune by '{by}': set by to params or macs")
        if begin >= end:
            raise OptionError(f"gates learn from {begin} to {end} of the run: set begin below end")
        self.grain, self.penalty, self.begin, self.end = grain, penalty, begin, end
        self.grace, self.by, self.remove_every = grace, by, remove_every
        self.budget = budget if isinstance(budget, Budget) or budget is None else Budget(budget)
        self.is_frozen = False
        self.is_above_path = True
        self.uses: dict[str, float] = {}  # of each weight, by layer
        self._is_active, self._logged = False, -1.0
        self._gates: list[tuple[str, nn.Module, Gate]] = []  # as this epoch has them
        self._priced_shapes: dict[str, torch.Size] = {}  # shapes of the gates that have their prices

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._gates, self._logged = [], -1.0

    def attach(self) -> None:
        """Gate the network."""
        attach_once(self.structure, self.grain, self.grace)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.budget is not None:
            check_budget(trainer, self.structure, self.budget.target, self.end, self.by)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._set_prices()  # a run that goes on may fit its gates before its first batch
        if self.is_frozen:
            with self.structure.changing():
                freeze_gates(self.structure.net)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ends = measure_epoch_progress(trainer) >= self.end
        if not self.is_frozen and (ends or (self.budget is not None and is_last_epoch(trainer))):
            self._freeze()
        # Below the budget's path, gates have to re-open: what they have shut stays at hand.
        is_due = trainer.current_epoch % self.remove_every == 0
        if is_due and (self.is_above_path or self.is_frozen):
            remove_dead_channels(self.structure)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.is_frozen and ends_within_epoch(trainer, self.end):
            self._freeze()
        # Told anew for each batch, so that it holds after a restart in the middle of an epoch, too.
        self._is_active = not self.is_frozen and self.begin <= measure_epoch_progress(trainer)
        if batch_idx == 0 or not self._gates:  # layers may have come since the last epoch
            form_blocks(self.structure.net)
            self._gates = list(iterate_gates(self.structure.net))
            self._set_prices()

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add the penalty's gradient to the scores."""
        if self._is_active and self.is_above_path:
            ids = set(map(id, parameters))
            gates = [entry for entry in self._gates if id(entry[2].score) in ids]
            add_penalty_gradient(gates, self.penalty)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_active and (trainer.fit_loop.total_batch_idx + 1) % EVERY == 0:
            self._steer(trainer)
        penalty = float(self.penalty) if self._is_active else 0.0
        if batch_idx == 0 or penalty != self._logged:
            # A number would wait for the device; a batch may be known to the step alone.
            pl_module.log("gates/penalty", torch.tensor(penalty), batch_size=1)
            self._logged = penalty

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        advance_grace(self.structure.net)

    def measure_size(self) -> float:
        """Estimate from the gates what the budget is about, params or MACs: for every few steps."""
        if self.by == "macs":
            return count_live_macs(self.structure.net, self.structure.widths, self.uses)
        return count_live_params(self.structure.net, self.structure.widths)

    def report(self) -> Mapping[str, Any]:
        """Return the budget and what has become of it; empty without one."""
        if self.budget is None:
            return {}
        return report_budget(self.structure.net, self.structure.example, self.budget.target, self.by)

    def _freeze(self) -> None:
        self.is_frozen = True
        net = self.structure.net
        with self.structure.changing():
            if self.budget is not None:  # its controller has come near to it
                size = partial(measure_compacted, net, self.structure.example, self.by, count_zeros=True)
                fit_gates_to_budget(net, self.budget.target, keep_best_gates, size)
            freeze_gates(net)

    def _steer(self, trainer: L.Trainer) -> None:
        """Follow the budget's path, and open gates again where too many have shut."""
        net, least = self.structure.net, 0.0
        if self.budget is not None:
            progress, size = measure_step_progress(trainer), self.measure_size()
            self.penalty = self.budget.steer(self.penalty, size, progress)
            path = self.budget.path(progress)
            self.is_above_path = size > path
            if size < LEAST * path:
                least = count_open(net) * path / size
        reopen_gates(net, least)

    def _set_prices(self) -> None:
        """Set what a weight of each layer costs, relative to the average."""
        if self.by != "macs":
            return
        shapes = {path: gate.score.shape for path, _, gate in iterate_gates(self.structure.net)}
        if shapes != self._priced_shapes:
            self._priced_shapes = shapes
            self.uses = count_macs_per_weight(self.structure.net, self.structure.example)
            set_prices(self.structure.net, self.uses)

    def state_dict(self) -> dict[str, Any]:
        budget = None if self.budget is None else dict(vars(self.budget))
        state = {"penalty": self.penalty, "is_frozen": self.is_frozen, "is_above_path": self.is_above_path}
        return {**state, "budget": budget}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.penalty, self.is_frozen = state_dict["penalty"], state_dict["is_frozen"]
        self.is_above_path = state_dict["is_above_path"]
        if self.budget is not None:  # one that the run is continued with begins now
            vars(self.budget).update(state_dict["budget"] or {})
