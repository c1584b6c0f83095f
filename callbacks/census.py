"""Count what the network is made of, epoch by epoch, and write down what has happened to it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn

from elastic.callbacks.base import ElasticCallback, StepNetwork, list_elastic
from elastic.files.atomic import write_lines
from elastic.growth.resolution import change_images
from elastic.measure.counts import count_macs, count_params, count_params_dense
from elastic.training.samples import count_samples
from elastic.widths.inputs import list_inputs

PASSES = 3  # of a training step, in forward passes: a backward pass has two products for the forward's one


class Census(ElasticCallback):
    """Log `size/params`, `size/params_dense`, `size/macs` and widths; write the timeline; keep the history.

    The timeline has one line a structural event: epoch, step, why, width (or stage, where blocks are
    counted), before, after. It is written as events happen, from what the structure remembers, so that a
    resumed run never holds events of epochs that were lost.

    Attributes:
        seconds: of training, over all starts of the run.
        macs_training: multiply-accumulates of all training steps, as dense kernels execute them: 3 × Σ over
            epochs (MACs of the network in that epoch × training samples seen). The 3 stands for a forward
            pass and a backward pass, which multiplies once for the gradient of the weights and once for that
            of the inputs (about two forward passes: the first layer has no use for the latter). Validation
            does not count.
    """

    def __init__(self, folder: str = ".") -> None:
        self.folder = Path(folder)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.macs_training = 0
        self._start = time.monotonic()
        self._samples = 0  # of this epoch, in all processes
        self._written = -1  # events
        self._macs: dict[tuple[Any, ...], int] = {}  # by network and shapes: each structure is counted once

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._start = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._samples = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._write_timeline(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += count_samples(batch) * trainer.world_size  # samplers give every process as many

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        net, sizes = self.structure.net, self.structure.widths.sizes()
        counts = {"params": count_params(net), "params_dense": count_params_dense(net)}
        counts["macs"] = self._count_macs(net, list_inputs(self.structure.example))
        pl_module.log_dict({f"size/{name}": float(value) for name, value in counts.items()})
        pl_module.log_dict({f"widths/{name}": float(size) for name, size in sizes.items()})
        if self.history and self.history[-1]["epoch"] == trainer.current_epoch:
            self.history.pop()  # an epoch may be validated several times: its end counts
        self.history.append({"epoch": trainer.current_epoch, **counts, "widths": sizes})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.history and trainer.state.fn == "fit" and not trainer.sanity_checking:
            for name, value in trainer.callback_metrics.items():
                if name.startswith(("train/", "val/")) and not name.endswith("_step"):  # of one batch
                    self.history[-1][name] = float(value)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Structure changes as an epoch begins: this one's is that of now.
        self.macs_training += self._samples * self._count_step_macs(trainer)
        now = time.monotonic()
        self.seconds, self._start = self.seconds + now - self._start, now
        self._written = -1
        self._write_timeline(trainer)

    def _count_step_macs(self, trainer: L.Trainer) -> int:
        """Count what a training step executes for one input, in forward passes."""
        networks = [step for callback in list_elastic(trainer) for step in callback.list_step_networks()]
        if not any(step.trained for step in networks):
            networks.append(StepNetwork(self.structure.net))
        full = small = list_inputs(self.structure.example)
        if self.structure.resize is not None:
            small, _ = change_images(self.structure.resize, full, {})
        return count_step_macs(
            networks, lambda step: self._count_macs(step.net, small if step.trained else full)
        )

    def _count_macs(self, net: nn.Module, inputs: Sequence[Tensor]) -> int:
        key = (id(net), *(tensor.shape for tensor in (*inputs, *net.parameters())))
        if key not in self._macs:
            self._macs[key] = count_macs(net, *inputs)
        return self._macs[key]

    def _write_timeline(self, trainer: L.Trainer) -> None:
        timeline = self.structure.timeline
        if trainer.is_global_zero and len(timeline) != self._written:
            write_lines(self.folder / "timeline.jsonl", timeline)
            self._written = len(timeline)

    def state_dict(self) -> dict[str, Any]:
        state = {"history": self.history, "seconds": self.seconds, "macs_training": self.macs_training}
        return {**state, "samples": self._samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.seconds = list(state_dict["history"]), state_dict["seconds"]
        self.macs_training, self._samples = state_dict["macs_training"], state_dict.get("samples", 0)


def count_step_macs(networks: Sequence[StepNetwork], count: Callable[[StepNetwork], int]) -> int:
    """Count the MACs of a training step for one input.

    Args:
        count: counts those of a network's forward pass.
    """
    macs_trained = sum(step.times * count(step) for step in networks if step.trained)
    macs = sum(step.times * count(step) for step in networks if not step.trained)
    return PASSES * round(macs_trained) + round(macs)
