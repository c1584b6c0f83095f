"""What the network is made of, epoch by epoch, and what has happened to it."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L

from elastic.files.atomic import write_atomically
from elastic.measure.counts import census, count_macs
from elastic.training.classifier import ElasticClassifier

PASSES = 3  # of a training step, in forward passes: a backward pass has two products for the forward's one


class Census(L.Callback):
    """Logs `size/params`, `size/params_dense` and `size/macs`; writes `timeline.jsonl`; keeps the history.

    The timeline has one line a structural event: epoch, step, why, width (or stage, where blocks are
    counted), before, after. It is written anew from what the module remembers, so that a resumed run never
    holds events of epochs that were lost.

    Attributes:
        seconds: of training, over all starts of the run.
        macs_training: multiply-accumulates of all training steps, as dense kernels execute them: 3 × Σ over
            epochs (MACs of the network in that epoch × training samples seen). The 3 stands for a forward
            pass and a backward pass, which multiplies once for the gradient of the weights and once for that
            of the inputs (about two forward passes: the first layer has no use for the latter). Validation
            does not count. None where a run was begun without the count.
    """

    def __init__(self, folder: str = ".") -> None:
        self.folder = Path(folder)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.macs_training: int | None = 0
        self._since = time.monotonic()
        self._samples = 0  # of this epoch, in all processes

    def on_fit_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        self._since = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        self._samples = 0

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ElasticClassifier, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        x_BCHW, _ = batch
        self._samples += len(x_BCHW) * trainer.world_size  # samplers give every process as many

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        now = census(pl_module.net, pl_module.widths, pl_module.example)
        counts = {"params": now.params, "params_dense": now.params_dense, "macs": now.macs}
        pl_module.log_dict({f"size/{name}": float(value) for name, value in counts.items()})
        if self.history and self.history[-1]["epoch"] == trainer.current_epoch:
            self.history.pop()  # an epoch may be validated several times: its end counts
        self.history.append({"epoch": trainer.current_epoch, **counts, "widths": now.widths})

    def on_validation_end(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        if self.history and trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.history[-1] |= {n: v for n, v in metrics.items() if n.startswith(("train/", "val/"))}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        if self.macs_training is not None:  # structure changes as an epoch begins: this one's is that of now
            self.macs_training += self._samples * self._macs(pl_module)
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        if trainer.is_global_zero:
            write_lines(self.folder / "timeline.jsonl", pl_module.timeline)

    def _macs(self, pl_module: ElasticClassifier) -> int:
        """For one input, in this epoch: of all that a training step executes."""
        example = pl_module.example
        trained = round(sum(often * count_macs(net, example) for net, often in pl_module.executed))
        return PASSES * trained + sum(count_macs(net, example) for net in pl_module.asked)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "seconds": self.seconds, "macs_training": self.macs_training}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.seconds = list(state_dict["history"]), state_dict["seconds"]
        self.macs_training = state_dict.get("macs_training")  # older checkpoints lack it


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line, put in place at once."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda part: part.write_text(text))
