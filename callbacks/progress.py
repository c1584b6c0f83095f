"""A progress bar that also shows what the network is made of now."""

from typing import Any

import lightning as L
from elastic.callbacks.gates import PruneByGates
from lightning.pytorch.callbacks import RichProgressBar

from elastic.training.classifier import ElasticClassifier


class ElasticProgress(RichProgressBar):
    """Lightning's rich bar, with the parameters left of those allocated, the widths and λ."""

    def get_metrics(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> dict[str, Any]:  # type: ignore[override]
        shown = {n: v for n, v in super().get_metrics(trainer, pl_module).items() if n != "v_num"}
        metrics = trainer.callback_metrics
        if "size/params" in metrics:
            dense = float(metrics["size/params_dense"])
            shown["params"] = f"{float(metrics['size/params']):,.0f}/{dense:,.0f}"
        sizes = list(pl_module.widths.sizes().values())
        shown["widths"] = "-".join(map(str, sizes)) if len(sizes) <= 8 else f"Σ{sum(sizes)}"
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PruneByGates):
                shown["λ"] = "frozen" if callback.frozen else f"{callback.penalty:.1e}"
        return shown
