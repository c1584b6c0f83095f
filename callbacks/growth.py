"""The network grows when its training saturates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch.nn.functional as F

from elastic.errors import TrainingError
from elastic.growth.amount import Growth
from elastic.growth.gradmax import gradmax
from elastic.growth.triggers import Trigger
from elastic.pruning import gates
from elastic.surgery.depth import count_blocks
from elastic.surgery.fresh import STRATEGIES, Fresh, zero_out
from elastic.surgery.reindexing import grow_index, split_index
from elastic.training.classifier import ElasticClassifier
from elastic.training.timeline import find_growth_at, read_timeline, select_growth

STARTS = (*STRATEGIES, "gradmax")
BATCH = 256  # training images that GradMax looks at


class GrowOnSaturation(L.Callback):
    """Watches a metric at the end of each validation; grows at the start of the next training epoch.

    Args:
        trigger: decides from the metric, e.g. `elastic.saturation.Plateau`.
        amount: how far and where, in width and in depth, `elastic.saturation.Growth`.
        monitor: the metric's name.
        fresh: how new channels start: zero_out, random, split (`elastic.fresh`) or gradmax
            (`elastic.gradmax`; needs a data module with `sample`).
        until: part of the run after which nothing grows any more.
        timeline: a `timeline.jsonl`: growth is then replayed from it, epoch by epoch, and nothing is watched.

    Example::

        GrowOnSaturation(Plateau(patience=3), Growth(factor=1.5, ceiling=4), monitor="val/acc")
    """

    def __init__(
        self,
        trigger: Trigger,
        amount: Growth,
        monitor: str = "val/acc",
        fresh: str = "zero_out",
        until: float = 0.6,
        timeline: str | None = None,
    ) -> None:
        if fresh not in STARTS:
            raise TrainingError(f"fresh channels cannot start by '{fresh}': choose {', '.join(STARTS)}")
        self.trigger, self.amount, self.monitor = trigger, amount, monitor
        self.fresh, self.until = fresh, until
        self.script = None if timeline is None else select_growth(read_timeline(Path(timeline)))
        self.due = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        """Refuse a timeline of another network before anything is trained."""
        stages = pl_module.start_depth
        for row in self.script or ():
            name = str(row.get("width", row.get("stage")))
            inside = any(name.startswith(f"{stage}." if stage else "") for stage in stages)
            if name not in pl_module.widths and name not in stages and not inside:
                raise TrainingError(
                    f"the timeline tells of '{name}', which this network has not: replay it on the network, "
                    "and with the start, of its own run"
                )

    def last(self, epochs: int) -> float:
        """The part of a run of so many epochs in which the network may still grow."""
        if self.script is None:
            return self.until
        return max((row["epoch"] for row in self.script), default=0) / epochs

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        """A first look at validation's metrics, before anything is trained; others come later."""
        if self.script is None and self.monitor.startswith("val/"):
            self._value(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.script is not None:
            return
        saturated = self.trigger.observe(self._value(trainer))
        early = trainer.current_epoch + 1 < self.until * (trainer.max_epochs or 0)
        self.due = pl_module.agree(saturated and early)

    def _value(self, trainer: L.Trainer) -> float:
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics))
            raise TrainingError(f"growth watches '{self.monitor}', which is not logged; there are: {logged}")
        return float(trainer.callback_metrics[self.monitor])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        if self.script is not None:
            self._grow(
                trainer, pl_module, *find_growth_at(self.script, trainer.current_epoch), "grow: timeline"
            )
        elif self.due:
            self.due = False
            fullness = gates.measure_openness(pl_module.net, pl_module.widths)
            target = self.amount.propose(pl_module.widths.sizes(), pl_module.start, fullness)
            stages = self.amount.deepen(count_blocks(pl_module.net), pl_module.start_depth)
            why = getattr(self.trigger, "why", f"{self.monitor} saturated")
            self._grow(trainer, pl_module, target, stages, f"grow: {why}")

    def _grow(
        self,
        trainer: L.Trainer,
        pl_module: ElasticClassifier,
        target: Mapping[str, int],
        stages: Sequence[str],
        why: str,
    ) -> None:
        """Bring widths to their targets, where they are not there yet, and add a block to each stage."""
        widths = pl_module.widths
        added = {name: size - widths[name].size for name, size in target.items() if size > widths[name].size}
        if not added and not stages:
            return
        changes = {name: grow_index(widths[name].size, by) for name, by in added.items()}
        if self.fresh == "split":
            source = pl_module.generator()
            changes = {name: split_index(widths[name].size, by, source) for name, by in added.items()}
        strategy = self._strategy(trainer, pl_module, added)
        pl_module.restructure(changes, why, strategy, stages)

    def _strategy(self, trainer: L.Trainer, pl_module: ElasticClassifier, added: Mapping[str, int]) -> Fresh:
        if self.fresh != "gradmax" or not added:
            return STRATEGIES.get(self.fresh, zero_out)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batch = data.sample(min(BATCH, len(data.train_set)), pl_module.seed)
        x_BCHW, y_B = (tensor.to(pl_module.device) for tensor in batch)
        return gradmax(
            pl_module.net,
            pl_module.widths,
            added,
            lambda net: F.cross_entropy(net(x_BCHW), y_B),
            pl_module.generator(),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"trigger": dict(vars(self.trigger)), "due": self.due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self.trigger).update(state_dict["trigger"])
        self.due = state_dict["due"]


def refuse_growth_after(end: float, trainer: L.Trainer) -> None:
    """A budget that is met at `end`, a part of the run, would be overrun by what grows later.

    Raises:
        TrainingError: the network may grow later.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GrowOnSaturation) and (last := callback.last(trainer.max_epochs or 1)) > end:
            raise TrainingError(
                f"growth goes on to {last:.0%} of the run, but the budget is met at {end:.0%}: lower "
                "callbacks.growth.until, or let pruning end later"
            )
