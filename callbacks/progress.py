"""Show what the network is made of now in the progress bar."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from elastic.errors import TrainingError
from elastic.training.joining import find_structure

MOST_WIDTHS = 8  # that are shown one by one


class ElasticProgress(RichProgressBar):
    """Extend Lightning's rich bar by the parameters left of those allocated, the widths and λ."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a trainer of `pytorch_lightning`, which has none of `lightning.pytorch`'s bars.

        Raises:
            TrainingError: it is one.
        """
        if not isinstance(trainer, L.Trainer):
            raise TrainingError(
                "ElasticProgress is a bar of lightning.pytorch, this run one of pytorch_lightning: leave it "
                "out, or say `import lightning.pytorch as pl`"
            )
        super().setup(trainer, pl_module, stage)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        entries: dict[str, Any] = super().get_metrics(trainer, pl_module)
        entries.pop("v_num", None)
        metrics = trainer.callback_metrics
        if "size/params" in metrics:
            dense = float(metrics["size/params_dense"])
            entries["params"] = f"{float(metrics['size/params']):,.0f}/{dense:,.0f}"
        if structure := find_structure(pl_module):
            sizes = list(structure.widths.sizes().values())
            entries["widths"] = "-".join(map(str, sizes)) if len(sizes) <= MOST_WIDTHS else f"Σ{sum(sizes)}"
        if "gates/penalty" in metrics:
            entries["λ"] = f"{float(metrics['gates/penalty']):.1e}"
        return entries
