"""Validate, save and keep an average of the weights over the last steps."""

from collections.abc import Mapping
from typing import Annotated, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from elastic.callbacks.base import ElasticCallback
from elastic.errors import TrainingError
from elastic.pruning.gates import Gate
from elastic.ranges import Range, checked
from elastic.training.history import HISTORY
from elastic.training.joining import find_structure
from elastic.training.locating import find_path
from elastic.widths.copying import copy_module
from elastic.widths.parameters import recompute_weights

Tensors = Mapping[str, Tensor]
# Where an average is, where what it is of is, its name there, and the module that has it.
Place = tuple[Tensors, Tensors, str, nn.Module]


@checked
class AverageWeights(ElasticCallback, EMAWeightAveraging):
    """Keep Lightning's exponential moving average, for a network whose structure changes.

    The averaged network is one of `Structure.copies`: what stays keeps its average, what is fresh starts
    as the model's. What is not trained has no average: frozen gates and counts are the model's.

    Arguments are Lightning's, and so are checkpoints: `state_dict` holds the average, `current_model_state`
    what is trained. Callbacks that stand before this one see the average at the end of a validation epoch.

    Example::

        AverageWeights(decay=0.99)
    """

    averages_weights = True

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: Annotated[float, Range(0, 1, below=True)] = 0.999,
        **options: Any,
    ) -> None:
        EMAWeightAveraging.__init__(self, device, use_buffers, decay, **options)
        self.decay = decay
        self._is_swapped = False  # the network has the average, which has what is trained
        self._has_begun = False  # there are averages; torch's count of them is on the device
        self._places: list[Place] = []

    def check(self, trainer: L.Trainer) -> None:
        """Refuse checkpoints that Lightning writes without asking callbacks, and so without the average."""
        if any(getattr(keep, "save_weights_only", False) for keep in trainer.checkpoint_callbacks):
            raise TrainingError(
                "checkpoints of weights only would hold what is trained, not the average that is validated: "
                "set save_weights_only=False"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy nothing yet: gates may still be attached, and a checkpoint may bring another structure."""
        ElasticCallback.setup(self, trainer, pl_module, stage)
        self._release()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        ElasticCallback.on_load_checkpoint(self, trainer, pl_module, checkpoint)
        if trainer.state.fn == "fit":
            self._begin(trainer, pl_module)  # the model has the checkpoint's structure by now
        EMAWeightAveraging.on_load_checkpoint(self, trainer, pl_module, checkpoint)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        ElasticCallback.on_save_checkpoint(self, trainer, pl_module, checkpoint)
        EMAWeightAveraging.on_save_checkpoint(self, trainer, pl_module, checkpoint)
        if self._average_model is not None:
            # The copy has followed the network's shapes, not its history.
            history = f"{find_path(pl_module, self.structure)}{HISTORY}"
            checkpoint["state_dict"][history] = self.structure.get_extra_state()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._average_model is None:
            self._begin(trainer, pl_module)
        else:  # a checkpoint is loaded before the model is brought to its device and its precision
            self._average_model.to(self._device or pl_module.device)
            for averages, tensors, name, _ in list_places(self._get_copy(), pl_module):
                averages[name].data = averages[name].to(tensors[name].dtype)
        assert self._average_model is not None
        self._has_begun = bool(self._average_model.n_averaged > 0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 or not self._places:  # the structure changes as an epoch begins
            self._adopt_modules(pl_module)
            self._places = list_places(self._get_copy(), pl_module)
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._update(pl_module)
            self._latest_update_step = step
        self._copy_untrained()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch
        self._adopt_modules(pl_module)
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            self._update(pl_module)
            self._latest_update_epoch = epoch
        self._copy_untrained()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give back what is trained where validation ends early: it may be saved now."""
        if self._is_swapped:
            self._swap_models(pl_module)
        super().on_exception(trainer, pl_module, exception)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the average; in a finished run that is continued Lightning does not."""
        self._copy_average_to_current(pl_module)
        self._release()

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        self._adopt_modules(pl_module)
        super()._swap_models(pl_module)
        self._is_swapped = not self._is_swapped

    def _copy_average_to_current(self, pl_module: L.LightningModule) -> None:
        self._adopt_modules(pl_module)
        super()._copy_average_to_current(pl_module)

    @torch.no_grad()
    def _update(self, pl_module: L.LightningModule) -> None:
        """Average as torch does, for all tensors in one call, and without reading the device's count."""
        average = self._average_model
        assert average is not None
        if not self._has_begun or self._device is not None:
            average.update_parameters(pl_module)
        else:
            pairs = self._pair(averaged=True)
            torch._foreach_lerp_([mean for mean, _ in pairs], [now for _, now in pairs], 1 - self.decay)
            average.n_averaged += 1
        self._has_begun = True

    @torch.no_grad()
    def _copy_untrained(self) -> None:
        """Copy from the model what has no average, or none yet."""
        pairs = self._pair(averaged=False)
        if pairs:
            torch._foreach_copy_([mean for mean, _ in pairs], [now for _, now in pairs])

    def _pair(self, averaged: bool) -> list[tuple[Tensor, Tensor]]:
        """Pair tensors of the copy with the model's, those that have an average by now or the others."""
        return [
            (averages[name], tensors[name])
            for averages, tensors, name, owner in self._places
            if self._is_averaged(tensors[name], owner) == averaged
        ]

    def _is_averaged(self, now: Tensor, owner: nn.Module) -> bool:
        """Tell whether a tensor of the model has an average by now."""
        # A program may say of all parameters that they are trained.
        is_trained = now.requires_grad and not (isinstance(owner, Gate) and owner.is_frozen)
        if not isinstance(now, nn.Parameter):
            is_trained = self._use_buffers and now.is_floating_point()
        return is_trained and self._has_begun

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()
        for module in pl_module.modules():  # whose hooks leave tensors with a graph, which no copy takes
            recompute_weights(module)
        with self.structure.showing_gates():
            self._average_model = AveragedModel(
                pl_module, self._device or pl_module.device, use_buffers=self._use_buffers, **self._kwargs
            )
        self.structure.copies += self._list_networks()

    def _release(self) -> None:
        if self._average_model is not None:
            averages = self._list_networks()
            self.structure.copies[:] = [net for net in self.structure.copies if net not in averages]
            self._average_model, self._places = None, []

    def _adopt_modules(self, pl_module: L.LightningModule) -> None:
        """Copy modules that a program has added to itself since the average began, as for one of its own."""
        copy = self._get_copy()
        paths = {path for path, _ in copy.named_modules()}
        for path, module in pl_module.named_modules():
            if path not in paths:
                parent, _, name = path.rpartition(".")
                setattr(copy.get_submodule(parent), name, copy_module(module))
                paths.update(f"{path}.{part}" for part, _ in module.named_modules())

    def _get_copy(self) -> nn.Module:
        assert self._average_model is not None
        copy: nn.Module = self._average_model.module
        return copy

    def _list_networks(self) -> list[nn.Module]:
        """List the averaged network, and those that follow it in the program."""
        structure = find_structure(self._get_copy())
        assert structure is not None
        return [structure.net, *(self._get_copy().get_submodule(path) for path in structure.copy_paths)]


def list_places(copy: nn.Module, module: nn.Module) -> list[Place]:
    """List where the tensors of a module and of its copy are, each once: looking for them takes its time."""
    places, visited = [], set[int]()
    for other, own in zip(copy.modules(), module.modules(), strict=True):
        for averages, tensors in ((other._parameters, own._parameters), (other._buffers, own._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in visited:
                    visited.add(id(tensor))
                    places.append((cast(Tensors, averages), cast(Tensors, tensors), name, own))
    return places
