"""Let the network grow when its training saturates."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from elastic.callbacks.base import ElasticCallback
from elastic.errors import OptionError
from elastic.growth.amount import Growth
from elastic.growth.gradmax import gradmax
from elastic.growth.triggers import Trigger
from elastic.ranges import NotNegative, Part, checked
from elastic.surgery.depth import count_blocks, list_growing_stages
from elastic.surgery.freezing import find_frozen_widths, is_frozen
from elastic.surgery.fresh import PAIRS, STRATEGIES, Fresh, zero_out
from elastic.surgery.indices import Index, grow_index, pair_index, split_index
from elastic.training.entry_rates import EntryRates
from elastic.training.kinds import overrides
from elastic.training.monitoring import check_logged, check_validation, is_validated
from elastic.training.progress import may_be_validated_later, measure_epoch_progress
from elastic.training.samples import check_loss, sample_batch
from elastic.training.timeline import check_replay, find_growth_at, read_timeline, select_growth
from elastic.widths.inputs import list_inputs

STARTS = (*STRATEGIES, *PAIRS, "gradmax")
BATCH = 256  # training images that GradMax looks at


@checked
class GrowOnSaturation(ElasticCallback):
    """Watch a metric once an epoch; grow at the start of the next training epoch.

    A metric that is there when validation ends is read then, one of training alone when the epoch ends, or
    before the next begins, where the module logs it in its own `on_train_epoch_end`.

    Args:
        trigger: decides from the metric, e.g. `elastic.Plateau`.
        amount: how far and where, in width and in depth.
        monitor: the metric's name; for a trigger that ignores it nothing has to be logged.
        fresh: how new channels start: zero_out, random, split, pairs, transfer (`elastic.surgery.fresh`) or
            gradmax (`elastic.growth.gradmax`).
        until: part of the run after which nothing grows any more.
        timeline: a `timeline.jsonl`: growth is then replayed from it, epoch by epoch, and nothing is watched.
        catch_up: what comes when a part b of the run has passed learns at the network's rate times
            1 / (1 - b) to this power: 0 for all alike, 1 so that it can go as far as what was there before.

    Raises:
        OptionError: an unknown start of fresh channels.
        StructureError: stages shall gain blocks, and none can.
        TrainingError: there is no validation to watch, or not one an epoch; the metric is not logged; a
            timeline of another network.

    Example::

        GrowOnSaturation(Plateau(patience=3), Growth(factor=1.5, ceiling=4), monitor="val/acc")
    """

    changes_structure = True

    def __init__(
        self,
        trigger: Trigger,
        amount: Growth,
        monitor: str = "val/acc",
        fresh: str = "zero_out",
        until: Part = 0.6,
        timeline: str | None = None,
        catch_up: NotNegative = 0.0,
    ) -> None:
        if fresh not in STARTS:
            raise OptionError(f"fresh channels cannot start by '{fresh}': choose {', '.join(STARTS)}")
        self.trigger, self.amount, self.monitor = trigger, amount, monitor
        self.fresh, self.until, self.catch_up = fresh, until, catch_up
        self.rates: EntryRates | None = None
        self.stages: list[str] = []  # those that may gain a block
        self.rows = [] if timeline is None else read_timeline(Path(timeline))
        self.script = None if timeline is None else select_growth(self.rows)
        self.is_due = False
        self._source: Literal["validation", "training"] | None = None  # of the metric, once it has come
        self._observed = -1  # the latest epoch whose metric the trigger has seen
        self._awaited_epoch: int | None = (
            None  # the epoch that has ended, and whose metric has not been observed
        )
        self._is_late = False  # the module logs the metric in a hook that is called after those of callbacks

    @property
    def _needs_metric(self) -> bool:
        """Tell whether growth depends on the metric: not where a timeline decides, or a clock."""
        return self.script is None and not getattr(self.trigger, "ignores_value", False)

    def find_last_growth(self, trainer: L.Trainer) -> float:
        """Return the part of the run after which the network does not grow."""
        if self.script is None:
            return self.until
        return measure_epoch_progress(trainer, max((row["epoch"] for row in self.script), default=0))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._source, self._observed, self._awaited_epoch = None, -1, None
        if stage == "fit" and self._needs_metric:
            check_validation(trainer, self.monitor)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.rates = EntryRates(trainer.optimizers) if self.catch_up else None
        check_replay(self.rows, self.structure)
        if self.script is None and self.amount.blocks:
            self.stages = list_growing_stages(self.structure.net, self.structure.widths)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.fresh == "gradmax":
            check_loss(trainer, self.structure)  # which is needed when much has been trained

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for validation's metric before anything is trained; a check may log nothing on purpose."""
        is_logged = any(map(is_validated, trainer.callback_metrics))
        if self._needs_metric and is_validated(self.monitor) and is_logged:
            check_logged(trainer, self.monitor)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit" and self._source != "training":
            self._decide(trainer, "validation", trainer.current_epoch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Metrics of training are lost where a run goes on as its epoch ends.
        if self._source == "validation" or self.script is not None or trainer.fit_loop.restarting:
            return
        is_missing = self._needs_metric and self.monitor not in trainer.callback_metrics
        if is_missing and overrides(pl_module, "on_train_epoch_end"):
            self._is_late = True  # from now on: what is there by then is of the epoch before
        self._awaited_epoch = trainer.current_epoch
        if not self._is_late:
            self._decide_awaited(trainer)

    def _decide_awaited(self, trainer: L.Trainer) -> None:
        """Decide by a metric of training, once it must be there."""
        if self._awaited_epoch is None:
            return
        if self._needs_metric and not may_be_validated_later(trainer, self._awaited_epoch):
            check_logged(trainer, self.monitor)
        self._decide(trainer, "training", self._awaited_epoch)
        self._awaited_epoch = None

    def _decide(self, trainer: L.Trainer, source: Literal["validation", "training"], epoch: int) -> None:
        """Let the trigger see the metric, once an epoch, and decide whether the network grows."""
        value = trainer.callback_metrics.get(self.monitor)
        is_early = source == "training" and trainer.enable_validation  # which a clock counts
        is_missing = value is None and (self._needs_metric or is_early)
        if self.script is not None or self._observed == epoch or is_missing:
            return
        self._source, self._observed = source, epoch
        is_saturated = self.trigger.observe(math.nan if value is None else float(value))
        is_in_time = measure_epoch_progress(trainer, epoch + 1) < self.until
        self.is_due = self.structure.agree(is_saturated and is_in_time)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._decide_awaited(trainer)
        if self.script is not None:
            self._grow(trainer, *find_growth_at(self.script, trainer.current_epoch), "grow: timeline")
        elif self.is_due:
            self.is_due = False
            sizes, stages = self._propose()
            reason = getattr(self.trigger, "reason", f"{self.monitor} saturated")
            self._grow(trainer, sizes, stages, f"grow: {reason}")

    def _propose(self) -> tuple[dict[str, int], list[str]]:
        """Propose new sizes of widths, and stages that gain a block, of what is not frozen."""
        structure = self.structure
        frozen = find_frozen_widths(structure.net, structure.widths)
        sizes = {name: size for name, size in structure.widths.sizes().items() if name not in frozen}
        blocks = {
            stage: count
            for stage, count in count_blocks(structure.net).items()
            if stage in self.stages and not is_frozen(structure.net, structure.widths, stage)
        }
        if frozen and not sizes and not blocks:
            rank_zero_warn(
                f"the network does not grow: {', '.join(sorted({*frozen.values()}))} "
                "are not trained (requires_grad=False), and stay as they are"
            )
        grown = self.amount.propose(sizes, structure.start_sizes)
        return grown, self.amount.deepen(blocks, structure.start_depth)

    def _grow(self, trainer: L.Trainer, sizes: Mapping[str, int], stages: Iterable[str], reason: str) -> None:
        """Bring widths to their new sizes, where they are smaller, and add a block to each stage."""
        structure, stages = self.structure, list(stages)
        widths = structure.widths
        added = {name: size - widths[name].size for name, size in sizes.items() if size > widths[name].size}
        if not added and not stages:
            return
        if self.rates is not None:
            self.rates.prepare()
        changes: dict[str, Index] = {n: grow_index(widths[n].size, by) for n, by in added.items()}
        if self.fresh == "split":
            generator = structure.make_generator()
            changes = {name: split_index(widths[name].size, by, generator) for name, by in added.items()}
        elif self.fresh in PAIRS:
            changes = self._grow_half(added, reason)
        structure.restructure(changes, reason, self._choose_start(trainer, added), stages)
        if self.rates is not None:
            remaining = 1 - measure_epoch_progress(trainer)
            self.rates.set_fresh(remaining**-self.catch_up)

    def _grow_half(self, added: Mapping[str, int], reason: str) -> dict[str, Index]:
        """Grow by half of the channels; return what lets each of them stand twice."""
        sizes = self.structure.widths.sizes()
        halves = {name: grow_index(sizes[name], count - count // 2) for name, count in added.items()}
        self.structure.restructure(halves, reason, PAIRS[self.fresh][0])
        return {name: pair_index(sizes[name], count) for name, count in added.items()}

    def _choose_start(self, trainer: L.Trainer, added: Mapping[str, int]) -> Fresh:
        if self.fresh in PAIRS:
            return PAIRS[self.fresh][1]
        if self.fresh != "gradmax" or not added:
            return STRATEGIES.get(self.fresh, zero_out)
        structure = self.structure
        x, y_B = sample_batch(trainer, BATCH, structure.seed)
        return gradmax(
            structure.net,
            structure.widths,
            added,
            lambda net: structure.compute_loss(net(*list_inputs(x)), y_B),
            structure.make_generator(),
        )

    def state_dict(self) -> dict[str, Any]:
        if self._awaited_epoch is not None and self.structure.trainer is not None:
            self._decide_awaited(self.structure.trainer)  # or a run that goes on would not know
        return {"trigger": dict(vars(self.trigger)), "is_due": self.is_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self.trigger).update(state_dict["trigger"])
        self.is_due = state_dict["is_due"]
