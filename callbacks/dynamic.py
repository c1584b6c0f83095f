"""Kernels are switched off per input: kernel activation modules, and the loss that makes them sparing."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from elastic.callbacks.levels import refuse_beside
from torch import Tensor

from elastic.dynamic.activations import Activation
from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.loss import ActivationCost, ActivationLoss, By, Form
from elastic.dynamic.modules import iterate_modules, select_set
from elastic.dynamic.norms import SetNorm
from elastic.errors import StructureError, TrainingError
from elastic.training.classifier import ElasticClassifier
from elastic.widths.discovery import discover

LOGGED: dict[str, By] = {"count": "kernels", "macs": "macs"}
COLD = 0.05  # the temperature at the end of a run, of soft gates


class PruneDynamically(L.Callback):
    """Gives the network kernel activation modules and adds the parsimony loss, see `elastic.parsimony`.

    Args:
        gain: G; several give as many sets of modules, of which each step trains one, drawn at random.
        form, by, target: see `Parsimony`.
        choice: how gates learn, see `elastic.dynamic.KernelActivation`.
        kind: what modules look at, see `elastic.dynamic.attach`.
        begin, end: parts of the run; the loss sets in at the first and grows to its full weight, or moves to
            its target, until the second: kernels that close all at once close whatever they are worth.
        rate: of the modules' learning, times the network's: modules start from nothing, and a trained network
            is thrown back by steps as large as they need.
        only: train the modules alone, and leave the network as it is to the last bit.

    Where there are levels, each of them gets modules of its own, and each step trains one, drawn at random.

    Example::

        SwitchKernels(gain=0.5, form="square")
    """

    def __init__(
        self,
        gain: float | Sequence[float] = 1.0,
        form: Form = "linear",
        by: By = "macs",
        target: float | None = None,
        choice: Activation = "ramp",
        kind: str = "input",
        begin: float = 0.1,
        end: float = 0.5,
        rate: float = 1.0,
        only: bool = False,
    ) -> None:
        gains = [gain] if isinstance(gain, int | float) else list(gain)
        if not gains or not 0 <= begin <= end < 1:
            raise StructureError(
                f"{len(gains)} gains, from {begin} to {end} of the run: give one or more, 0 ≤ begin ≤ end < 1"
            )
        if rate <= 0:
            raise StructureError(
                f"modules that learn {rate:g} times as fast as the network: set rate above 0"
            )
        self.parsimony = [ActivationLoss(each, form, by, target) for each in gains]
        self.choice, self.kind, self.begin, self.end = choice, kind, begin, end
        self.rate, self.only = rate, only
        self.engaged: list[ActivationCost] = []
        self.active_set, self.ripe = 0, 1.0
        self.price_LS = torch.zeros(0, len(self.parsimony))  # of each level's and set's share

    def setup(self, trainer: L.Trainer, pl_module: ElasticClassifier, stage: str) -> None:  # type: ignore[override]
        refuse_beside(trainer, "kernel activation modules")
        own = self.engaged[0].net if self.engaged else None
        if stage != "fit" or (pl_module.switched and pl_module.switched[0] is own):
            return
        if pl_module.switched:
            raise TrainingError(
                "the network has kernel activation modules, of another SwitchKernels: continue with that one"
            )
        if trainer.world_size > 1 and (pl_module.levels is not None or len(self.parsimony) > 1):
            raise TrainingError("several sets, or levels, are trained in one process: set trainer.devices=1")
        nets = [pl_module.net] if pl_module.levels is None else list(pl_module.levels)
        widths = [discover(net, pl_module.example) for net in nets]
        how = (len(self.parsimony), self.choice, self.kind)
        pl_module.switch(
            [attach_modules(net, w, None, *how) for net, w in zip(nets, widths, strict=True)], self.rate
        )
        self.engaged = [ActivationCost(net, pl_module.example) for net in pl_module.switched]
        self.price_LS = torch.zeros(len(nets), len(self.parsimony))
        pl_module.executed = [(net, 1 / len(nets)) for net in nets]
        pl_module.others = range(len(nets) - 1)
        pl_module.level = len(nets) - 1
        if self.only:
            for net in nets:
                net.requires_grad_(False)

    def on_train_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        self.price_LS = self.price_LS.to(pl_module.device)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        progress = trainer.current_epoch / (trainer.max_epochs or 1)
        for module in iterate_modules(pl_module):
            module.temperature = COLD**progress
        if self.only:
            for held in (pl_module.net, *_norms(pl_module)):
                held.eval()
        pl_module.loss_terms.pop("parsimony", None)
        if progress >= self.begin:
            rising = progress < self.end
            self.ripe = (progress - self.begin) / (self.end - self.begin) if rising else 1.0
            pl_module.loss_terms["parsimony"] = lambda *_: self.loss(pl_module)

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ElasticClassifier, batch: Any, batch_idx: int
    ) -> None:
        self._draw(pl_module)

    def _draw(self, pl_module: ElasticClassifier) -> None:
        """The level and the set of modules that this step trains."""
        if len(pl_module.switched) > 1:
            pl_module.level = int(torch.randint(len(pl_module.switched), ()))
        if len(self.parsimony) > 1:
            self.active_set = int(torch.randint(len(self.parsimony), ()))
            select_set(pl_module, self.active_set)

    def loss(self, pl_module: ElasticClassifier) -> Tensor:
        parsimony, price = self.parsimony[self.active_set], self.price_LS[pl_module.level, self.active_set]
        return parsimony.loss(self.engaged[pl_module.level].fraction(parsimony.by), self.ripe, price)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: ElasticClassifier, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.parsimony[self.active_set].target is not None and "parsimony" in pl_module.loss_terms:
            self._reprice(trainer, pl_module.level)

    @torch.no_grad()
    def _reprice(self, trainer: L.Trainer, level: int) -> None:
        parsimony, part = self.parsimony[self.active_set], 1 / trainer.num_training_batches
        share = trainer.strategy.reduce(self.engaged[level].fraction(parsimony.by), reduce_op="mean")
        assert isinstance(share, Tensor)
        price = self.price_LS[level, self.active_set]
        self.price_LS[level, self.active_set] = parsimony.update_multiplier(price, share, self.ripe, part)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        if pl_module.switched:  # not so where a network is looked at before it is trained
            self._first(pl_module)

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: ElasticClassifier,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        _: int = 0,
    ) -> None:
        if not self.engaged:
            return
        engaged, size = self.engaged[pl_module.level], len(batch[0])
        for name, by in LOGGED.items():
            value = engaged.fraction(by)
            pl_module.log(f"engaged/{name}", value, on_epoch=True, batch_size=size, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        return {"price_LS": self.price_LS.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.price_LS = state_dict["price_LS"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: ElasticClassifier) -> None:  # type: ignore[override]
        """The network is as the first set leaves it, whenever it is saved."""
        self._first(pl_module)
        if not self.only:
            for norm in _norms(pl_module):
                norm.hand_over()

    def _first(self, pl_module: ElasticClassifier) -> None:
        """The largest level, and the first set."""
        pl_module.level = len(pl_module.switched) - 1
        select_set(pl_module, 0)


def _norms(pl_module: ElasticClassifier) -> list[SetNorm]:
    return [module for module in pl_module.modules() if isinstance(module, SetNorm)]
