"""Samples for a decision, whatever batches are made of: as the network is given them in a training step."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from elastic import Growth, Periodic
from elastic.callbacks import GrowOnSaturation, LogPanels, PruneDynamically, TrainJointly
from elastic.errors import TrainingError
from elastic.training.joining import find_structure
from elastic.training.samples import sample_batch, take_samples
from elastic.widths.inputs import list_inputs
from tests.programs import BATCH, QUIET, Program, Spy, make_data
from tests.several import make_inputs, make_net

SAMPLES = 64
IMAGES, LABELS = make_data().tensors


def name(columns: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {"image": columns[0], "label": columns[1]}


class Named(Program):
    """Has batches with names, as data sets of Hugging Face and of MONAI do."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["image"], batch["label"]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch["image"], batch["label"]), batch_idx)


class Normalizing(Named):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step({**batch, "image": batch["image"] / 2}, batch_idx)


def load(make: Callable[[tuple[Tensor, ...]], Mapping[str, Tensor]] = name) -> DataLoader[Any]:
    def collate(samples: Any) -> Mapping[str, Tensor]:
        return make(tuple(torch.stack([*column]) for column in zip(*samples, strict=True)))

    numbered = torch.utils.data.TensorDataset(IMAGES, LABELS, torch.arange(len(IMAGES)))
    return DataLoader(numbered, BATCH, collate_fn=collate)


def fit(
    module: L.LightningModule, callbacks: list[L.Callback], loader: DataLoader[Any], **options: Any
) -> None:
    L.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": callbacks, **options}).fit(module, loader, loader)


def take(
    module: L.LightningModule, callback: L.Callback, loader: DataLoader[Any], taking: Any = sample_batch
) -> Any:
    """Take samples as a run with a callback begins."""
    taken: list[Any] = []
    spy = Spy(on_train_start=lambda trainer, _: taken.append(taking(trainer, SAMPLES, 0)))
    fit(module, [callback, spy], loader, max_steps=1)
    return taken[0]


@pytest.mark.parametrize("kind", [Named, Normalizing])
@pytest.mark.parametrize("callback", [lambda: PruneDynamically(gain=0.5), lambda: TrainJointly([0.5])])
def test_batches_with_names(kind: type[Named], callback: Callable[[], L.Callback]) -> None:
    torch.manual_seed(0)
    x, y_B = take(kind(), callback(), load())
    torch.testing.assert_close(x, IMAGES[:SAMPLES] / (2 if kind is Normalizing else 1))
    assert torch.equal(y_B, LABELS[:SAMPLES])


@pytest.mark.parametrize(
    "callback",
    [
        lambda: GrowOnSaturation(Periodic(1), Growth(ceiling=2), monitor="train/loss", fresh="gradmax"),
        lambda: TrainJointly([0.5], importance="taylor"),
        lambda: PruneDynamically(form="target", target=0.5, start="saliency"),
    ],
    ids=["gradmax", "taylor", "saliency"],
)
def test_what_decides_by_samples_takes_them(callback: Callable[[], L.Callback]) -> None:
    torch.manual_seed(0)
    module = Named()
    fit(module, [callback()], load(), max_epochs=2)
    structure = find_structure(module)
    assert structure is not None
    assert structure.timeline or structure.levels is not None or structure.dynamic_nets


def test_inputs_are_known_where_targets_are_not() -> None:
    def number(columns: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {**name(columns), "index": columns[2]}

    x, y_B = take(Named(), LogPanels(), load(number), take_samples)
    assert torch.equal(x, IMAGES[:SAMPLES]) and y_B is None
    with pytest.raises(TrainingError, match="the targets of samples cannot be told") as caught:
        take(Named(), LogPanels(), load(number))
    assert "\n" not in str(caught.value)


def test_batches_whose_step_ends_before_the_network_are_refused() -> None:
    class Broken(Named):
        example_input_array = IMAGES[:2]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("mask")

    with pytest.raises(TrainingError, match=r"samples cannot be taken from the batches \(.*mask.*\)"):
        take(Broken(), LogPanels(), load(), take_samples)


class Flat(L.LightningModule):
    """Has batches of all inputs and then the targets, which no names tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net("conditional")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, label, y_B = batch
        return F.cross_entropy(self.net(x, label), y_B)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def test_batches_of_several_inputs_and_targets() -> None:
    first, second = make_inputs("conditional", SAMPLES)
    targets = torch.arange(SAMPLES) % 3
    loader = DataLoader(torch.utils.data.TensorDataset(first, second, targets), 16)
    x, y_B = take(Flat(), LogPanels(), loader)
    assert [*map(torch.equal, list_inputs(x), (first, second))] == [True, True]
    assert torch.equal(y_B, targets)
