"""The network grows when its training saturates."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch.nn.functional as F

from elastic import gates
from elastic.fresh import STRATEGIES, Fresh
from elastic.gradmax import gradmax
from elastic.module import ElasticModule, TrainingError
from elastic.saturation import Growth, Trigger
from elastic.surgery import grow_index, split_index

STARTS = (*STRATEGIES, "gradmax")
BATCH = 256  # training images that GradMax looks at


class GrowOnSaturation(L.Callback):
    """Watches a metric at the end of each validation; grows at the start of the next training epoch.

    Args:
        trigger: decides from the metric, e.g. `elastic.saturation.Plateau`.
        growth: how far and where, `elastic.saturation.Growth`.
        monitor: the metric's name.
        fresh: how new channels start: zero_out, random, split (`elastic.fresh`) or gradmax
            (`elastic.gradmax`; needs a data module with `sample`).
        until: part of the run after which nothing grows any more.
        rewarm: epochs over which the learning rate rises again from a tenth after each growth; 0 keeps it.

    Example::

        GrowOnSaturation(Plateau(patience=3), Growth(factor=1.5, ceiling=4), monitor="val/acc")
    """

    def __init__(
        self,
        trigger: Trigger,
        growth: Growth,
        monitor: str = "val/acc",
        fresh: str = "zero_out",
        until: float = 0.6,
        rewarm: int = 0,
    ) -> None:
        if fresh not in STARTS:
            raise TrainingError(f"fresh channels cannot start by '{fresh}': choose {', '.join(STARTS)}")
        self.trigger, self.growth, self.monitor = trigger, growth, monitor
        self.fresh, self.until, self.rewarm = fresh, until, rewarm
        self.due = False
        self.grown_at: int | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: ElasticModule) -> None:  # type: ignore[override]
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics))
            raise TrainingError(f"growth watches '{self.monitor}', which is not logged; there are: {logged}")
        saturated = self.trigger.observe(float(trainer.callback_metrics[self.monitor]))
        self.due = saturated and trainer.current_epoch + 1 < self.until * (trainer.max_epochs or 0)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: ElasticModule) -> None:  # type: ignore[override]
        if not self.due:
            return
        self.due = False
        widths = pl_module.widths
        fullness = gates.fullness(pl_module.net, widths)
        target = self.growth.propose(widths.sizes(), pl_module.start, fullness)
        if target:
            added = {name: size - widths[name].size for name, size in target.items()}
            changes = {name: grow_index(widths[name].size, by) for name, by in added.items()}
            if self.fresh == "split":
                source = pl_module.generator()
                changes = {name: split_index(widths[name].size, by, source) for name, by in added.items()}
            strategy = self._strategy(trainer, pl_module, added)
            pl_module.restructure(changes, f"grow: {self.monitor} saturated", strategy)
            self.grown_at = trainer.global_step

    def _strategy(self, trainer: L.Trainer, pl_module: ElasticModule, added: Mapping[str, int]) -> Fresh:
        if self.fresh != "gradmax":
            return STRATEGIES[self.fresh]
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

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: ElasticModule, *_: Any) -> None:  # type: ignore[override]
        if self.rewarm and self.grown_at is not None:
            steps = self.rewarm * trainer.num_training_batches / trainer.accumulate_grad_batches
            pl_module.lr_scale = min(1.0, 0.1 + 0.9 * (trainer.global_step - self.grown_at) / steps)

    def state_dict(self) -> dict[str, Any]:
        return {"trigger": dict(vars(self.trigger)), "due": self.due, "grown_at": self.grown_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self.trigger).update(state_dict["trigger"])
        self.due, self.grown_at = state_dict["due"], state_dict["grown_at"]
