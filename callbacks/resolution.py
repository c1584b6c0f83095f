"""Let training images grow as the run goes on."""

import lightning as L
from torch import Tensor

from elastic.callbacks.base import ElasticCallback
from elastic.errors import TrainingError
from elastic.growth.resolution import Resolution, change_images, resize
from elastic.training.imitation import find_output_shapes
from elastic.training.progress import measure_epoch_progress
from elastic.widths.inputs import list_inputs, select_samples


class GrowResolution(ElasticCallback):
    """Train on small images first, which become larger from epoch to epoch: early epochs cost less.

    The network's first input, and all others that are images of its size, are resized as it is called in a
    training step. Validation and tests see full images, and so does a teacher.

    Args:
        resolution: how large images are when.

    Raises:
        TrainingError: inputs that are no images, a network that takes no smaller ones, or one that answers
            otherwise to them (segmentation).

    Example::

        GrowResolution(Resolution(start=0.5, until=0.7))
    """

    def __init__(self, resolution: Resolution) -> None:
        self.resolution = resolution

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._check()
            self.structure.resize = self._resize

    def _check(self) -> None:
        net, example = self.structure.net, self.structure.example
        images = select_samples(example, slice(1))
        x_1CHW = images[0]
        if x_1CHW.ndim != 4:
            raise TrainingError(
                f"inputs of shape {tuple(x_1CHW.shape[1:])} are no images: leave out GrowResolution"
            )
        sides = self.resolution.compute_sides(x_1CHW.shape[2:], 0.0)
        small, _ = change_images(lambda x_BCHW: resize(x_BCHW, sides), images, {})
        try:
            outputs = [find_output_shapes(net, x) for x in (images, small)]
        except (RuntimeError, ValueError, AssertionError) as error:  # as networks say it themselves
            raise TrainingError(
                f"the network takes no images of {sides[0]} by {sides[1]} pixels, at which "
                "they are to start: raise callbacks.resolution.resolution.start"
            ) from error
        if outputs[0] != outputs[1]:
            raise TrainingError(
                "the size of the network's output depends on that of the image, and so would its targets': "
                "leave out GrowResolution"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            sides = self._compute_sides(list_inputs(self.structure.example)[0])
            pl_module.log("resolution/height", float(sides[0]))

    def _resize(self, x_BCHW: Tensor) -> Tensor:
        return resize(x_BCHW, self._compute_sides(x_BCHW))

    def _compute_sides(self, x_BCHW: Tensor) -> list[int]:
        trainer = self.structure.trainer
        assert trainer is not None
        return self.resolution.compute_sides(x_BCHW.shape[2:], measure_epoch_progress(trainer))
