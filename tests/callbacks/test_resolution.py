"""What a network is given as images grow: recorded by the network itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from elastic.callbacks import Census, Distil, GrowResolution, TrainJointly
from elastic.errors import TrainingError
from elastic.growth import Resolution
from elastic.levels.nested import Levels
from elastic.measure.counts import count_macs
from tests.programs import BATCH, IMAGES, Program, Spy, fit, make_network
from tests.runs import configure

EPOCHS = 4
SIDES = [4, 6, 8, 8]  # of images of 8 pixels: full size after half of the run


class Witness(nn.Sequential):
    """Note the height of what comes: in training, and else."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.trained: list[int] = []
        self.others: list[int] = []

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_tracing() and isinstance(input, Tensor) and len(input) == BATCH:
            (self.trained if self.training else self.others).append(input.shape[2])
        output: Tensor = super().forward(input)
        return output


class OfOneSize(nn.Sequential):
    """Assert the size of images, as networks of patches do."""

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.shape[2] == 8, "images of 8 pixels")
        output: Tensor = super().forward(input)
        return output


def make_witness() -> Witness:
    torch.manual_seed(0)
    return Witness(*make_network())


def grow_images() -> GrowResolution:
    return GrowResolution(Resolution(start=0.5, until=0.5, multiple=1))


def train(net: nn.Module, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    module = Program(net)
    module.example_input_array = torch.zeros(1, 1, 8, 8)
    return fit(module, [*callbacks, grow_images()], max_epochs=EPOCHS, **options)


def per_epoch(heights: Sequence[int]) -> list[int]:
    """List the heights of epochs, in each of which all are the same."""
    batches = IMAGES // BATCH
    epochs = [heights[i : i + batches] for i in range(0, len(heights), batches)]
    assert all(len(set(epoch)) == 1 for epoch in epochs)
    return [epoch[0] for epoch in epochs]


def test_training_images_grow_and_validation_sees_full_ones() -> None:
    net = make_witness()
    train(net, num_sanity_val_steps=0)
    assert per_epoch(net.trained) == SIDES
    assert set(net.others) == {8}


def test_a_network_that_has_been_trained_takes_images_as_they_are() -> None:
    net = make_witness()
    train(net)
    net.trained.clear()
    net.train()(torch.zeros(BATCH, 1, 5, 5))
    assert net.trained == [5]


def test_outputs_may_have_parts_that_are_no_tensors() -> None:
    class Telling(nn.Sequential):
        def forward(self, input: Tensor) -> tuple[Tensor, str]:  # type: ignore[override]
            return super().forward(input), "scores of classes"

    class First(Program):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            logits_BK: Tensor = self.net(x_BCHW)[0]
            return logits_BK

    fit(First(Telling(*make_network())), [grow_images()], max_epochs=1)


def test_a_teacher_sees_full_images() -> None:
    teacher, net = make_witness(), make_witness()
    train(net, Distil(teacher))
    assert set(teacher.others) == {8} and per_epoch(net.trained) == SIDES


def test_levels_that_are_trained_jointly_see_what_the_network_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    net, of_levels = make_witness(), []
    run = Levels.run

    def note(levels: Levels, k: int, x_BCHW: Tensor, **options: Any) -> Any:
        if net.training:
            of_levels.append(x_BCHW.shape[2])
        return run(levels, k, x_BCHW, **options)

    monkeypatch.setattr(Levels, "run", note)
    train(net, TrainJointly([0.5]))
    assert per_epoch(of_levels) == SIDES


def test_training_macs_are_those_of_the_images_that_were_trained_on(tmp_path: Path) -> None:
    census = Census(str(tmp_path))
    net = make_network()
    train(net, census)
    images = IMAGES // BATCH * BATCH
    expected = sum(3 * images * count_macs(net, torch.zeros(1, 1, side, side)) for side in SIDES)
    assert census.macs_training == expected
    assert [row["macs"] for row in census.history] == [count_macs(net, torch.zeros(1, 1, 8, 8))] * EPOCHS


def test_the_height_is_logged() -> None:
    heights: list[float] = []
    spy = Spy(on_train_epoch_end=lambda t, m: heights.append(float(t.callback_metrics["resolution/height"])))
    train(make_network(), spy)
    assert heights == SIDES


@pytest.mark.parametrize(
    ("net", "example", "said"),
    [
        (OfOneSize(*make_network()), torch.zeros(2, 1, 8, 8), "no images of 4 by 4 pixels"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)),
            torch.zeros(2, 1, 8, 8),
            "output depends on that of the image",
        ),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)),
            torch.zeros(2, 1, 8, 8),
            r"no images of 4 by 4 pixels.*raise .*start",
        ),
        (
            nn.Sequential(
                nn.Conv1d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 4)
            ),
            torch.zeros(2, 1, 8),
            r"shape \(1, 8\) are no images",
        ),
    ],
)
def test_what_cannot_be_trained_on_small_images_is_refused(
    net: nn.Module, example: Tensor, said: str
) -> None:
    module = Program(net)
    module.example_input_array = example
    with pytest.raises(TrainingError, match=said) as refusal:
        fit(module, [grow_images()])
    assert "\n" not in str(refusal.value)


def test_the_schedule_makes_the_callback(tmp_path: Path) -> None:
    cfg = configure(
        tmp_path, "schedule=[growth,gates,resolution]", "callbacks.resolution.resolution.start=0.25"
    )
    assert cfg.callbacks.resolution.resolution.start == 0.25 and "growth" in cfg.callbacks
