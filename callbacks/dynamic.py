"""Switch kernels off per input: kernel activation modules, and the loss that makes them sparing."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor

from elastic.callbacks.base import ElasticCallback, StepNetwork, refuse_changes_beside
from elastic.dynamic.activations import Activation
from elastic.dynamic.loss import HAVE_TARGET, ActivationCost, ActivationLoss, By, Form, compute_ramp
from elastic.dynamic.modules import iterate_modules, lower_scores, select_set
from elastic.dynamic.norms import SetNorm
from elastic.dynamic.saliency import Saliency
from elastic.errors import OptionError, TrainingError
from elastic.ranges import Fraction, NotNegative, Part, Positive, checked
from elastic.training.progress import measure_epoch_progress, measure_step_progress
from elastic.training.samples import count_samples, take_samples
from elastic.widths.inputs import split_batch

Start = Literal["order", "saliency"]
SAMPLES, BATCH = 4096, 256  # training images that modules are fitted to
COLD = 0.05  # the temperature at the end of a run, of soft gates
MEASURES: tuple[By, ...] = ("kernels", "macs")


@checked
class PruneDynamically(ElasticCallback):
    """Give the network kernel activation modules and add the activation loss, see `elastic.dynamic.loss`.

    Args:
        gain: G; several give as many sets of modules, of which each step trains one, drawn at random.
        form, by, target: see `ActivationLoss`.
        activation: how modules learn, see `elastic.dynamic.modules.KernelActivation`.
        kind, branches: what modules look at, and whether they switch kernels that end a branch, too; see
            `elastic.dynamic.attach_modules`.
        begin, end: parts of the run; the loss sets in at the first and grows to its full weight, or moves to
            its target, until the second: kernels that close all at once close whatever they are worth.
        rate: of the modules' learning, times the network's: modules start from nothing, and a trained network
            is thrown back by steps as large as they need.
        modules_only: train the modules alone, and leave the network as it is to the last bit.
        start: how modules start: all kernels on, in the "order" of what they are worth, for any network; or
            fitted to each input's "saliency" (`elastic.dynamic.saliency`), for a network that is trained.
        saliency: weight of a loss that goes on teaching modules saliency; an input's choice does not depend
            on the rest of its batch then, and the network learns nothing through what modules look at.
        contrast: how much of what an input's saliency differs by from the mean over inputs is taught: the
            less, the more kernels have one choice for all inputs, to which weights can adapt.
        difficulty: above 0, inputs whose class the network is sure of are taught to engage less than others:
            saliency is multiplied by this power of the entropy of what the network says of an input.
        freeze: part of the run from which modules learn no more, and weights adapt to a choice that stays.

    Where there are levels, each of them gets modules of its own, and each step trains one, drawn at random.

    Raises:
        OptionError: options that cannot be.
        TrainingError: a network that changes in the same run, or has modules already.

    Example::

        PruneDynamically(gain=0.5, form="square")
    """

    def __init__(
        self,
        gain: NotNegative | Sequence[NotNegative] = 1.0,
        form: Form | None = None,
        by: By = "macs",
        target: Fraction | None = None,
        activation: Activation = "ramp",
        kind: str = "input",
        branches: bool = False,
        begin: Part = 0.1,
        end: Part = 0.5,
        rate: Positive = 1.0,
        modules_only: bool = False,
        start: Start = "order",
        saliency: NotNegative = 0.0,
        contrast: Part = 1.0,
        difficulty: NotNegative = 0.0,
        freeze: Part = 1.0,
    ) -> None:
        gains = list(gain) if isinstance(gain, Iterable) else [gain]
        self.activation, self.kind, self.begin, self.end = activation, kind, begin, end
        self.branches, self.rate, self.modules_only = branches, rate, modules_only
        self.start, self.saliency, self.contrast, self.freeze = start, saliency, contrast, freeze
        self.difficulty = difficulty
        self._check_options(len(gains))
        self.losses = [ActivationLoss(gain, form, by, target) for gain in gains]
        self.costs: list[ActivationCost] = []
        self.has_started = self.is_frozen = False
        self.active_set, self.ramp_up = 0, 0.0
        self.is_active = False
        self.multiplier_LS = torch.zeros(0, len(self.losses))  # of each level's and set's fraction
        self.threshold_LS = self.multiplier_LS.clone()  # what saliency has to exceed, subtracted from biases
        self._saliencies: list[Saliency] = []
        self._fraction: Tensor | None = None  # of what the last call in a training step has engaged

    def _check_options(self, gains: int) -> None:
        if not gains or not self.begin <= self.end < 1:
            raise OptionError(
                f"{gains} gains, from {self.begin} to {self.end} of the run: give one or more, "
                "0 ≤ begin ≤ end < 1"
            )
        if self.start not in get_args(Start):
            raise OptionError(
                f"modules cannot start by '{self.start}': set start to {' or '.join(get_args(Start))}"
            )
        if self.modules_only and self.freeze < 1:
            raise OptionError("where modules alone are trained, they cannot freeze: leave one of both out")
        if self.difficulty and not self.saliency and self.start != "saliency":
            raise OptionError(
                "nothing teaches modules what is difficult: set saliency above 0, or difficulty=0"
            )

    def list_step_networks(self) -> Sequence[StepNetwork]:
        """List the levels, of which each step trains one."""
        return [StepNetwork(net, 1 / len(self.structure.nets)) for net in self.structure.nets]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_changes_beside(trainer, "kernel activation modules")
        structure = self.structure
        if stage != "fit" or self._has_attached():
            return
        if structure.dynamic_nets:
            raise TrainingError(
                "the network has kernel activation modules, another PruneDynamically's: continue with that"
            )
        if trainer.world_size > 1 and (structure.levels is not None or len(self.losses) > 1):
            raise TrainingError("several sets, or levels, are trained in one process: set trainer.devices=1")
        with structure.showing_gates():
            self._attach_modules()

    def _start_anew(self, trainer: L.Trainer) -> None:
        if not self._has_attached():  # modules of an earlier fit go on from where they are
            super()._start_anew(trainer)

    def _has_attached(self) -> bool:
        """Tell whether the network's modules are those that this callback has made."""
        nets = self.structure.dynamic_nets
        return bool(nets and self.costs) and nets[0] is self.costs[0].net

    def _attach_modules(self) -> None:
        structure, sets = self.structure, len(self.losses)
        nets = structure.nets
        options = {"activation": self.activation, "kind": self.kind, "branches": self.branches}
        structure.attach_dynamic(self.rate, sets=sets, **options)
        structure.extra_levels = range(len(nets) - 1)
        structure.level = len(nets) - 1
        self.costs = [ActivationCost(net, structure.example) for net in structure.dynamic_nets]
        self.multiplier_LS = torch.zeros(len(nets), sets)
        self.threshold_LS = torch.zeros(len(nets), sets)
        self.is_frozen = False
        if self.modules_only:
            for net in nets:
                net.requires_grad_(False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        has_target = any(loss.form == "target" for loss in self.losses)
        if has_target and not math.isfinite(trainer.num_training_batches):
            raise TrainingError(
                "a target is approached epoch by epoch, and the data has no length: set "
                "trainer.limit_train_batches, or another form"
            )
        self.multiplier_LS = self.multiplier_LS.to(pl_module.device)
        self.threshold_LS = self.threshold_LS.to(pl_module.device)
        if self.saliency or self.start == "saliency":
            self._start_saliency(trainer)

    def _start_saliency(self, trainer: L.Trainer) -> None:
        if self.difficulty and self.structure.outputs != "classes":
            raise TrainingError("difficulty is that of telling classes: set callbacks.dynamic.difficulty=0")
        self._saliencies = [
            Saliency(net, self.contrast, self.difficulty) for net in self.structure.dynamic_nets
        ]
        if self.start == "saliency" and not self.has_started:
            x, _ = take_samples(trainer, SAMPLES, self.structure.make_seed(0))
            for level, saliency in enumerate(self._saliencies):
                self.threshold_LS[level] = saliency.fit(split_batch(x, BATCH))
        self.has_started = True
        for module in iterate_modules(self.structure.kernel_modules):
            module.is_steady = self.saliency > 0
        if not self.saliency:
            self._remove_saliencies()

    def _remove_saliencies(self) -> None:
        for saliency in self._saliencies:
            saliency.remove()
        self._saliencies = []

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._remove_saliencies()
        super().teardown(trainer, pl_module, stage)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._remove_saliencies()
        super().on_exception(trainer, pl_module, exception)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Told anew for each batch, so that it holds after a restart in the middle of an epoch, too.
        progress = measure_epoch_progress(trainer)
        if self.modules_only:
            for fixed in (self.structure.net, *self._list_norms()):
                fixed.eval()
        for module in iterate_modules(self.structure.kernel_modules):
            module.temperature = COLD**progress
        self.is_active = progress >= self.begin
        self.ramp_up = compute_ramp(progress, self.begin, self.end)
        if progress >= self.freeze and not self.is_frozen:
            self.is_frozen = True
            self.structure.kernel_modules.requires_grad_(False)
        self._draw()

    def _draw(self) -> None:
        """Draw the level and the set of modules that this step trains."""
        if len(self.structure.dynamic_nets) > 1:
            self.structure.level = int(torch.randint(len(self.structure.dynamic_nets), ()))
        if len(self.losses) > 1:
            self.active_set = int(torch.randint(len(self.losses), ()))
            select_set(self.structure.kernel_modules, self.active_set)

    def compute_loss(self, output: Any, *inputs: Any, **named: Any) -> Tensor | None:
        """Return the loss of what this call has engaged."""
        level, loss = self.structure.level, self.losses[self.active_set]
        terms = []
        if self.is_active:
            is_charged = loss.form != "threshold"
            with torch.set_grad_enabled(is_charged):
                fraction = self.costs[level].fraction(loss.by)
            self._fraction = fraction.detach()
            if is_charged:
                multiplier = self.multiplier_LS[level, self.active_set]
                terms.append(loss.loss(fraction, self.ramp_up, multiplier))
        if self._saliencies and not self.is_frozen:
            threshold = self.threshold_LS[level, self.active_set]
            distance = self._saliencies[level].compute_loss(threshold, output)
            terms.append(self.saliency * distance)
        return torch.stack(terms).sum() if terms else None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fraction, self._fraction = self._fraction, None
        if fraction is not None and self.losses[self.active_set].form in HAVE_TARGET:
            self._follow_target(trainer, self.structure.level, fraction)

    @torch.no_grad()
    def _follow_target(self, trainer: L.Trainer, level: int, fraction: Tensor) -> None:
        loss = self.losses[self.active_set]
        fraction = trainer.strategy.reduce(fraction, reduce_op="mean")  # type: ignore[assignment]
        if loss.form == "threshold":
            ramp_up = compute_ramp(measure_step_progress(trainer), self.begin, self.end)
            rise = loss.compute_rise(fraction, ramp_up)
            self.threshold_LS[level, self.active_set] += rise
            lower_scores(self.structure.dynamic_nets[level], rise)
            return
        multiplier = self.multiplier_LS[level, self.active_set]
        self.multiplier_LS[level, self.active_set] = loss.update_multiplier(
            multiplier, fraction, self.ramp_up, 1 / trainer.num_training_batches
        )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.structure.dynamic_nets:  # not so where a network is looked at before it is trained
            self.structure.select_first()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self.costs:
            return
        cost, size = self.costs[self.structure.level], count_samples(batch)
        for by in MEASURES:
            pl_module.log(f"dynamic/{by}", cost.fraction(by), on_epoch=True, batch_size=size, sync_dist=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the network as the first set has it, whenever it is saved."""
        self.structure.select_first()
        if not self.modules_only:
            for norm in self._list_norms():
                norm.hand_over()

    def _list_norms(self) -> list[SetNorm]:
        return [module for module in self.structure.kernel_modules.modules() if isinstance(module, SetNorm)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "multiplier_LS": self.multiplier_LS.clone(),
            "threshold_LS": self.threshold_LS.clone(),
            "has_started": self.has_started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.multiplier_LS, self.threshold_LS = state_dict["multiplier_LS"], state_dict["threshold_LS"]
        self.has_started = state_dict["has_started"]
