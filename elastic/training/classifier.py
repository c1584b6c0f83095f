"""The one LightningModule: any CNN, any schedule. Callbacks decide what changes; this carries it out."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from elastic.dynamic.attaching import MODULES
from elastic.errors import TrainingError
from elastic.levels.nested import Levels
from elastic.surgery.depth import count_blocks, deepen, get_template_name
from elastic.surgery.fresh import Fresh, zero_out
from elastic.surgery.rebuilding import rebuild
from elastic.surgery.reindexing import Index, reindex
from elastic.training.processes import find_differing_processes, unwrapped
from elastic.widths.discovery import discover
from elastic.widths.tracing import sync_traced

T = TypeVar("T")

# What torch's schedulers call the number of steps they are to last.
LENGTH = ("total_steps", "T_max", "total_iters")

RATE = "rate"  # a parameter group's learning rate, times the scheduled one

ONEDNN_BLOCK = 16  # channels, with AVX-512; 8 with AVX2


class ElasticClassifier(L.LightningModule):
    """Trains a classifier whose widths may change between epochs.

    The loss is the cross entropy plus every entry of `loss_terms`, a named function (x_BCHW, logits_BK) ->
    scalar each, which callbacks register. `restructure` is the only way to change the network; it keeps the
    timeline, and networks of the same structure in `copies` (averaged weights, say) follow.

    Args:
        net: any CNN, x_BCHW -> logits_BK.
        shape: (C, H, W) of an input.
        classes: K.
        optimizer: parameter groups -> optimizer.
        scheduler: optimizer -> scheduler, stepped every batch; told the number of steps where it asks.
        seed: all randomness of an epoch follows from it and the epoch, so that a resumed run is the same.
    """

    def __init__(
        self,
        net: nn.Module,
        shape: tuple[int, int, int],
        classes: int,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., Any] | None = None,
        seed: int = 0,
        label_smoothing: float = 0.0,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.net, self.seed, self.label_smoothing = net, seed, label_smoothing
        self.example = torch.zeros(1, *shape)
        self.widths = discover(net, self.example)
        self.start, self.start_depth = self.widths.sizes(), count_blocks(net)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.channels_last, self.overruns = channels_last, False
        self.memory_format = torch.contiguous_format
        self.loss_terms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        self.levels: Levels | None = None
        self.level = 0  # that is trained and evaluated, where there are several
        self.others: Sequence[int] = ()  # levels that are validated beside it
        self.switched: list[fx.GraphModule] = []  # the levels with kernel activation modules
        self.module_rate = 1.0  # of their learning, times the network's
        self.executed: list[tuple[nn.Module, float]] = [(net, 1.0)]  # in a training step, and how often
        self.asked: list[nn.Module] = []  # in a training step, forward only
        self.timeline: list[dict[str, Any]] = []
        self.copies: list[nn.Module] = []
        self.lr_scale = 1.0
        self.share = 1.0  # of the run that the optimizer and its schedule last
        self.train_loss = MeanMetric(nan_strategy="disable")  # a NaN must show
        self.train_acc = MulticlassAccuracy(classes, average="micro")
        self.val_acc = MulticlassAccuracy(classes, average="micro")
        self.test_acc = MulticlassAccuracy(classes, average="micro")
        self.lay_out()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.run_level(self.level, x_BCHW.contiguous(memory_format=self.memory_format))

    def run_level(self, k: int, x_BCHW: Tensor) -> Tensor:
        """Level k, or the network where there are no levels; with its modules, if it has any."""
        switched = self.switched[k] if self.switched else None
        if switched is not None:
            sync_traced(switched, self._level(k), self.net.training)
        if self.levels is not None:
            return self.levels.run(k, x_BCHW, switched)
        return (self.net if switched is None else switched)(x_BCHW)  # type: ignore[no-any-return]

    def _level(self, k: int) -> nn.Module:
        return self.net if self.levels is None else self.levels[k]

    def _apply(self, *args: Any, **options: Any) -> Any:
        """Moved or converted: what shares tensors with the network, or holds its buffers, looks again."""
        super()._apply(*args, **options)
        if self.levels is not None:
            self.levels.refresh()
        for k, switched in enumerate(self.switched):
            sync_traced(switched, self._level(k), self.net.training)
        return self

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x_BCHW, y_B = batch
        x_BCHW = x_BCHW.contiguous(memory_format=self.memory_format)
        logits_BK = self(x_BCHW)
        loss = F.cross_entropy(logits_BK, y_B, label_smoothing=self.label_smoothing)
        self.train_loss.update(loss.detach())
        self.train_acc.update(logits_BK.detach(), y_B)
        return sum((term(x_BCHW, logits_BK) for term in self.loss_terms.values()), start=loss)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_acc)

    def _evaluate(self, batch: tuple[Tensor, Tensor], part: str, metric: MulticlassAccuracy) -> None:
        x_BCHW, y_B = batch
        logits_BK = self(x_BCHW)
        metric.update(logits_BK, y_B)
        self.log(f"{part}/acc", metric, on_epoch=True, on_step=False, prog_bar=True)
        self.log(f"{part}/loss", F.cross_entropy(logits_BK, y_B), on_epoch=True, sync_dist=True)
        if self.levels is not None:
            for k in self.others:
                right = (self.run_level(k, x_BCHW).argmax(1) == y_B).float().mean()
                self.log(f"{part}/acc/level{k}", right, on_epoch=True, batch_size=len(y_B))

    def setup(self, stage: str) -> None:
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        self.overruns = stage == "fit" and on_cpu and self.trainer.precision == "32-true"
        self.lay_out()

    def on_train_epoch_start(self) -> None:
        rank = [self.global_rank] if self.global_rank else []  # each process draws its own augmentation
        L.seed_everything(self._seed(self.current_epoch, 0, *rank), verbose=False)

    def on_validation_epoch_start(self) -> None:
        """The training epoch's figures, logged with the validation's: callbacks then find both."""
        if self.trainer.sanity_checking or self.trainer.state.fn != "fit":
            return
        loss, accuracy = self.train_loss.compute(), self.train_acc.compute()
        self.train_loss.reset()
        self.train_acc.reset()
        if not torch.isfinite(loss) or not all(p.isfinite().all() for p in self.net.parameters()):
            saved = "; the epochs before are saved" if self.current_epoch else ""
            raise TrainingError(
                f"training diverged, the loss is {loss.item():.3g} in epoch {self.current_epoch}: "
                f"lower optimizer.optimizer.lr{saved}"
            )
        self.log_dict({"train/loss": loss, "train/acc": accuracy}, prog_bar=True)

    # Structure.

    def restructure(
        self, changes: Mapping[str, Index], why: str, fresh: Fresh = zero_out, stages: Iterable[str] = ()
    ) -> None:
        """Re-index widths of the network and of all that follows it, deepen stages, and note it.

        In several processes call it in each, with the same arguments (see `agree`).
        """
        before = self.widths.sizes()
        place = {"epoch": self.current_epoch, "step": self.global_step, "why": why}
        with self.changing():
            reindex(
                self.net,
                self.widths,
                changes,
                optimizers=self._optimizers(),
                copies=self.copies,
                fresh=fresh,
                generator=self.generator(),
            )
            for name in changes:
                after = self.widths[name].size
                self.timeline.append({**place, "width": name, "before": before[name], "after": after})
            for stage in stages:
                count = self._deepen(stage)
                self.timeline.append({**place, "stage": stage, "before": count, "after": count + 1})

    def _deepen(self, stage: str) -> int:
        """Append a block to a stage; returns how many it had."""
        deepen(self.net, self.widths, stage, copies=self.copies, generator=self.generator())
        count = len(self.net.get_submodule(stage)) - 1  # type: ignore[arg-type]
        for name in self.widths.keys() - self.start.keys():  # as far from its ceiling as its model
            self.start[name] = self.start[get_template_name(stage, count, name)]
        for optimizer in self._optimizers():  # in the order that a resumed run will build them in
            for group, anew in zip(optimizer.param_groups, self._groups(), strict=True):
                group["params"] = anew["params"]
        return count

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change of structure, or of what is trained: whoever knows the network looks again.

        Raises:
            TrainingError: the processes of the run no longer agree.
        """
        with unwrapped(self.trainer) if self._trainer else nullcontext():
            yield
            self.lay_out()
        if self.net._compiled_call_impl is not None:
            torch.compiler.reset()  # or it would fall back to eager, silently, after eight shapes
        if self._trainer and (ranks := find_differing_processes(self.trainer, self.net)):
            raise TrainingError(
                f"processes {ranks} no longer hold the network of process 0: all of them must run the same "
                "code on the same data; continue from the last checkpoint"
            )

    def agree(self, decision: T) -> T:
        """The decision of the first process, in all of them; to be called in each."""
        return decision if self._trainer is None else self.trainer.strategy.broadcast(decision)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [] if self._trainer is None else self.trainer.optimizers

    def lay_out(self) -> None:
        """One memory format for all tensors, whenever they were made: a resumed run must not differ."""
        nets = [self.net] if self.levels is None else list(self.levels)
        last = self.channels_last and not (self.overruns and any(_overrun(net) for net in nets))
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        for net in (self.net, *self.copies):
            net.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        if self.levels is not None:
            self.levels.refresh()

    def generator(self) -> torch.Generator:
        """Randomness for the next structural event: of its own, or a resumed run would differ."""
        return torch.Generator().manual_seed(self._seed(self.current_epoch, 1 + len(self.timeline)))

    def _seed(self, *key: int) -> int:
        """A seed for each (run seed, key); neighbouring run seeds must not repeat each other's."""
        return int(np.random.SeedSequence([self.seed, *key]).generate_state(1)[0])

    def nest(self, levels: Levels) -> None:
        """From here on the network has levels; what it had trained stays the largest."""
        self.levels, self.level, self.level_norms = levels, len(levels) - 1, levels.norms
        levels.refresh()  # the network may have been laid out since they were made

    def switch(self, switched: Sequence[fx.GraphModule], rate: float = 1.0) -> None:
        """From here on each level runs with kernel activation modules: `elastic.dynamic.attach`.

        Args:
            rate: of their learning, times the network's.
        """
        self.switched, self.module_rate = list(switched), rate
        self.kams = nn.ModuleList(net.get_submodule(MODULES) for net in switched)

    # Optimization.

    def configure_optimizers(self) -> Any:
        """Weights decay; norms, biases and gate scores do not."""
        optimizer = self.make_optimizer(self._groups())
        if self.make_scheduler is None:
            return optimizer
        steps = round(self.trainer.estimated_stepping_batches * self.share)
        known = inspect.signature(self.make_scheduler).parameters
        given = getattr(self.make_scheduler, "keywords", {})
        length = {name: steps for name in LENGTH if name in known and name not in given}
        try:
            scheduler = self.make_scheduler(optimizer, **length)
        except ZeroDivisionError as error:  # OneCycleLR, where its warm-up is of one step
            raise TrainingError(
                f"the scheduler cannot be spread over {steps} steps: raise trainer.max_epochs, lower "
                "data.batch_size or set optimizer.scheduler=null"
            ) from error
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            # By steps: by epochs Lightning does it after the checkpoint, and a resumed run would lose one.
            every = int(self.trainer.num_training_batches)
            how = {"scheduler": scheduler, "interval": "step", "frequency": every, "monitor": "val/loss"}
        else:
            how = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": how}

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters by whether they decay and how fast they learn, the network's first."""
        groups: dict[tuple[bool, float], dict[str, Any]] = {
            (True, 1.0): {"params": []},
            (False, 1.0): {"params": [], "weight_decay": 0.0},
        }
        for name, parameter in self.named_parameters():
            weighs, rate = parameter.dim() > 1 and not name.endswith("score"), 1.0
            if name.startswith(f"{MODULES}."):
                # A score sums over all that its module reads, and so over the noise of their weights' steps.
                rate = self.module_rate * (parameter.shape[1] ** -0.5 if weighs else 1.0)
            like = groups.setdefault((weighs, rate), {**groups[weighs, 1.0], "params": [], RATE: rate})
            like["params"].append(parameter)
        return list(groups.values())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step at `lr_scale` times the scheduled learning rate, which schedulers never see."""
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= self.lr_scale * group.get(RATE, 1.0)
        super().optimizer_step(*args, **kwargs)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["elastic"] = {"start": self.start, "sizes": self.widths.sizes(), "timeline": self.timeline}
        if self.levels is not None:
            checkpoint["elastic"]["levels"] = self.levels.sizes[:-1]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        held = checkpoint["elastic"]
        if not self.start.items() <= held["start"].items():  # blocks may have been added
            raise TrainingError(
                f"the checkpoint started as {held['start']}, this model starts as {self.start}: "
                "continue with the configuration the run was started with"
            )
        self.start, self.timeline = dict(held["start"]), list(held["timeline"])
        if "levels" in held and self.levels is None:  # budgets of latency might give others today
            self.nest(Levels(self.net, self.widths, held["levels"]))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Takes any state of this architecture, whatever its widths: the shapes are rebuilt first."""
        net = {name: value for name, value in state_dict.items() if name.startswith("net.")}
        rebuild(self.net, self.widths, net, "net.")
        self.lay_out()
        return super().load_state_dict(state_dict, *args, **kwargs)


def _overrun(net: nn.Module) -> bool:
    """Whether oneDNN may write where it must not, going back through fp32 tensors laid out channels last.

    It does in 1×1 convolutions of a stride beyond 1 that read fewer channels than its block of 8 or 16:
    https://github.com/uxlfoundation/oneDNN/issues/6035 (torch 2.14 too).
    """
    pointwise = (m for m in net.modules() if isinstance(m, nn.Conv2d) and set(m.kernel_size) == {1})
    return any(max(m.stride) > 1 and m.in_channels < ONEDNN_BLOCK for m in pointwise)
