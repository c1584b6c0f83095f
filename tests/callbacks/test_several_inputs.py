"""Programs whose network takes several inputs are followed from their own calls, and trained like others."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elastic import Growth, Periodic
from elastic.callbacks import (
    Census,
    Distil,
    FollowNetwork,
    GrowOnSaturation,
    GrowResolution,
    PruneByGates,
    PruneDynamically,
    TrainJointly,
)
from elastic.growth import Resolution
from elastic.growth.resolution import change_images
from elastic.measure.counts import count_macs
from elastic.pruning import compact
from elastic.training import joining
from elastic.training.joining import find_example, find_structure
from elastic.training.loading import load_module
from elastic.training.samples import sample_batch
from elastic.training.structure import Structure
from elastic.widths.inputs import list_inputs
from tests.programs import QUIET, Spy
from tests.several import CLASSES, Conditional, make_inputs, make_net

IMAGES = 32
OPTIONS = QUIET | {"num_sanity_val_steps": 0, "log_every_n_steps": 1}


class Pairs(L.LightningModule):
    """Trains a network of two inputs, whose batches are pairs of inputs and targets."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = make_net(name)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (first, second), y_B = batch
        output = self.net(first, second)
        loss = F.cross_entropy(output, y_B) if output.dim() == 2 else F.mse_loss(output, first)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", -self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def load_pairs(name: str) -> DataLoader[Any]:
    def collate(samples: Any) -> Any:
        first, second, target = (torch.stack([*column]) for column in zip(*samples, strict=True))
        return [first, second], target

    first, second = make_inputs(name, IMAGES)
    return DataLoader(TensorDataset(first, second, torch.arange(IMAGES) % CLASSES), 16, collate_fn=collate)


def train(name: str, callbacks: Sequence[L.Callback], folder: Path | None = None, epochs: int = 3) -> Pairs:
    torch.manual_seed(0)
    module = Pairs(name)
    trainer = L.Trainer(max_epochs=epochs, callbacks=[*callbacks], **OPTIONS)  # type: ignore[arg-type]
    trainer.fit(module, load_pairs(name), load_pairs(name))
    if folder is not None:
        trainer.save_checkpoint(folder / "last.ckpt")
    return module.eval()


def structure_of(module: L.LightningModule) -> Structure:
    structure = find_structure(module)
    assert structure is not None
    return structure


def grow(name: str) -> GrowOnSaturation:
    fresh = "gradmax" if name == "conditional" else "zero_out"
    return GrowOnSaturation(Periodic(1), Growth(factor=1.5, ceiling=2), fresh=fresh)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["conditional", "siamese", "timed"])
def test_networks_of_several_inputs_grow_and_are_pruned(name: str, tmp_path: Path) -> None:
    inputs = make_inputs(name, 3, seed=5)
    conditional = PruneByGates(budget=30_000, by="macs", grain="channel")  # an embedding takes none
    gates = conditional if name == "conditional" else PruneByGates(budget=300)
    module = train(name, [Census(str(tmp_path)), grow(name), gates], tmp_path, epochs=2)
    structure = structure_of(module)
    assert any(row["after"] > row["before"] for row in structure.timeline)
    plain = compact(structure.net, structure.example)
    torch.testing.assert_close(plain(*inputs), structure.net(*inputs), rtol=1e-4, atol=1e-5)
    loaded = load_module(Pairs, tmp_path / "last.ckpt")
    assert torch.equal(loaded.net(*inputs), module.net(*inputs))


def test_levels_and_modules_of_several_inputs_are_trained(tmp_path: Path) -> None:
    """Each step of the whole run trains all levels, then one of them with modules."""
    joint = train("conditional", [TrainJointly([0.5], importance="taylor")], tmp_path, epochs=2)
    levels, inputs = structure_of(joint).levels, make_inputs("conditional", 3, seed=5)
    assert levels is not None
    plain = compact(levels[0].eval(), inputs)
    torch.testing.assert_close(plain(*inputs), levels[0](*inputs), rtol=1e-4, atol=1e-5)
    loaded = structure_of(load_module(Pairs, tmp_path / "last.ckpt")).levels
    assert loaded is not None and torch.equal(loaded[0].eval()(*inputs), levels[0](*inputs))
    dynamic = structure_of(train("conditional", [PruneDynamically(gain=0.5, start="saliency")], epochs=1))
    (net,) = dynamic.dynamic_nets
    assert net.eval()(*inputs).shape == (3, CLASSES)
    torch.testing.assert_close(
        compact(dynamic.net, inputs)(*inputs), dynamic.net(*inputs), rtol=1e-4, atol=1e-5
    )


def test_both_images_of_a_pair_become_small_and_a_teacher_sees_both_in_full(tmp_path: Path) -> None:
    seen: dict[str, set[tuple[int, ...]]] = {"teacher": set(), "net": set()}

    def note(key: str) -> Callable[..., None]:
        def look(layer: nn.Module, inputs: Any) -> None:
            if layer.training == (key == "net"):
                seen[key].update(tuple(x.shape[2:]) for x in inputs if type(x) is Tensor and not x.is_meta)

        return look

    teacher = make_net("siamese")
    teacher.register_forward_pre_hook(note("teacher"))
    watch = Spy(on_fit_start=lambda _, module: module.net.body.register_forward_pre_hook(note("net")))
    census = Census(str(tmp_path))
    resolution = GrowResolution(Resolution(0.5, 0.9, multiple=1))
    train("siamese", [census, Distil(teacher), resolution, watch], epochs=1)
    assert seen == {"teacher": {(8, 8)}, "net": {(4, 4)}}
    macs = {side: count_macs(teacher, *[torch.zeros(1, 1, side, side)] * 2) for side in (4, 8)}
    assert census.macs_training == IMAGES * (3 * macs[4] + macs[8])


def test_images_are_changed_wherever_a_call_has_them() -> None:
    x, mask, label = torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4) > 0, torch.ones(2)
    other = torch.ones(2, 3, 2, 2)
    args, kwargs = change_images(torch.neg, (x, mask, label), {"like": x + 1, "other": other, "scale": 2.0})
    assert torch.equal(args[0], -x) and args[1] is mask and args[2] is label
    assert torch.equal(kwargs["like"], -x - 1) and kwargs["other"] is other and kwargs["scale"] == 2.0
    assert torch.equal(change_images(torch.neg, (), {"x": x})[1]["x"], -x)


# --- how a program calls its network ------------------------------------------------------------------------


class Scaled(Conditional):
    """Takes a number beside its tensors."""

    def forward(self, x: Tensor, label: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(x, label)


class Unconditional(Conditional):
    """Runs without a label, too, but not through the same layers."""

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return (
            super().forward(x, label) if label is not None else self.head(self.last(self.conv(self.stem(x))))
        )


class Calling(L.LightningModule):
    """Calls its network in a way of its own."""

    def __init__(
        self, call: Callable[[Any, Tensor, Tensor], Any], net: nn.Module, **others: nn.Module
    ) -> None:
        super().__init__()
        self.call, self.net = call, net
        for name, other in others.items():
            setattr(self, name, other)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Any:
        return self.net(x, label) if label is not None else self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, label, y = batch
        return F.cross_entropy(self.call(self, x, label), y)


def log_and_call(module: Calling, x: Tensor, label: Tensor) -> Tensor:
    module.log("train/brightness", x.mean())
    module.log_dict({"train/labels": label.float().mean()})
    return module.net(x, label)  # type: ignore[no-any-return]


class Wrapping(nn.Module):
    """Hold a network in a module that is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Conditional()
        self.compile(backend="eager")

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.inner(x, label)  # type: ignore[no-any-return]


CALLS: dict[str, Callable[[], Calling]] = {
    "by position": lambda: Calling(lambda m, x, label: m.net(x, label), Conditional()),
    "by name": lambda: Calling(lambda m, x, label: m.net(label=label, x=x), Conditional()),
    "by forward": lambda: Calling(lambda m, x, label: m(x, label), Conditional()),
    "with a number": lambda: Calling(lambda m, x, label: m.net(x, label, scale=2.0), Scaled()),
    "optionally": lambda: Calling(lambda m, x, label: m(x, label), Unconditional()),
    "beside another": lambda: Calling(
        lambda m, x, label: m.net(x, label), Conditional(), other=nn.Linear(2, 2)
    ),
    "behind what it logs": lambda: Calling(log_and_call, Conditional(), other=nn.Linear(2, 2)),
    "where that is compiled": lambda: Calling(lambda m, x, label: m.net(x, label), Wrapping()),
}


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_what_a_training_step_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, (x, label) = CALLS[name](), make_inputs("conditional")
    monkeypatch.setattr(joining, "_take_batch", lambda *_: [x, label, torch.tensor([0, 1])])
    example = find_example(L.Trainer(logger=False), module, getattr(module.net, "inner", module.net))
    assert isinstance(example, tuple) and [*map(torch.equal, example, (x, label))] == [True, True]
    assert not {"log", "log_dict"} & set(vars(module))


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("is_whole", [False, True])
def test_inputs_are_those_of_the_example_that_lightning_knows(by_name: bool, is_whole: bool) -> None:
    module, (x, label) = CALLS["by position"](), make_inputs("conditional")
    module.example_input_array = {"label": label, "x": x} if by_name else (x, label)
    example = find_example(L.Trainer(logger=False), module, module if is_whole else module.net)
    assert isinstance(example, tuple) and [*map(torch.equal, example, (x, label))] == [True, True]


def test_inputs_may_be_given(tmp_path: Path) -> None:
    inputs = make_inputs("timed")
    module = train("timed", [FollowNetwork("net", example=inputs), PruneByGates(penalty=1e-2)], epochs=1)
    assert structure_of(module).example is not None and len(list_inputs(structure_of(module).example)) == 2


def test_samples_of_several_inputs_are_joined() -> None:
    samples: list[Any] = []
    take = Spy(on_train_start=lambda trainer, _: samples.append(sample_batch(trainer, IMAGES, 0)))
    train("conditional", [take], epochs=1)
    ((first, label), y), (whole, labels) = samples[0], make_inputs("conditional", IMAGES)
    assert torch.equal(first, whole) and torch.equal(label, labels)
    assert torch.equal(y, torch.arange(IMAGES) % CLASSES)
