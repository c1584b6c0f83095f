"""Programs that make their network, data and inputs in their own ways are followed, or told what to give."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from elastic import Growth, Periodic, compact
from elastic.callbacks import (
    AverageWeights,
    Census,
    Distil,
    FollowNetwork,
    GrowOnSaturation,
    GrowResolution,
    PruneByGates,
    PruneDynamically,
    Reconstruct,
    TrainJointly,
)
from elastic.errors import StructureError, TrainingError
from elastic.growth import Resolution
from elastic.training import checks
from elastic.training.joining import find_structure
from elastic.training.loading import load_module
from elastic.training.samples import count_samples
from tests.programs import BATCH, QUIET, Program, Spy, fit, make_data, make_network

SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def grow(**options: Any) -> GrowOnSaturation:
    return GrowOnSaturation(Periodic(2), Growth(factor=1.5, ceiling=2), until=0.7, **options)


def get_sizes(module: L.LightningModule) -> dict[str, int]:
    structure = find_structure(module)
    assert structure is not None
    return structure.widths.sizes()


class Layers(Program):
    """Has its layers itself, as the first example of many courses does."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.first, self.last = nn.Conv2d(1, 6, 3), nn.Linear(6, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.last(self.first(x_BCHW).relu().mean((2, 3)))  # type: ignore[no-any-return]


class Looking(Program):
    """Takes features of a block from a hook, and a mean from an attribute, and has both in its loss."""

    def __init__(self) -> None:
        super().__init__(KeepingNetwork())
        self.features: list[Tensor] = []
        self.net.body[1].register_forward_hook(lambda m, a, y: self.features.append(y))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.features.clear()
        loss: Tensor = super().training_step(batch, batch_idx)
        (feature_BCHW,) = self.features
        channels = self.net.body[1][0].out_channels
        assert feature_BCHW.shape == (len(batch[1]), channels, 8, 8) and feature_BCHW.requires_grad
        torch.testing.assert_close(self.net.mean, feature_BCHW.mean())
        return loss + 0.1 * feature_BCHW.square().mean() + self.net.mean


class KeepingNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = make_network()
        self.body, self.head = nn.Sequential(layers[:3], layers[3:6]), layers[6:]
        self.mean: Tensor | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.body(x_BCHW)
        self.mean = y_BCHW.mean()
        return self.head(y_BCHW)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make",
    [grow, PruneByGates, lambda: TrainJointly([0.5]), lambda: PruneDynamically(gain=0.5)],
    ids=["growth", "gates", "joint", "dynamic"],
)
def test_a_program_finds_what_its_own_calls_have_kept(make: Callable[[], L.Callback]) -> None:
    """And neither what tracing leaves, nor what the smaller levels do."""
    program = Looking()
    fit(program, [make()], max_epochs=4)
    assert program.features and program.net.mean is not None


def test_a_module_may_itself_be_the_network(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"2 children .* or '' for the module itself"):
        fit(Layers(), [grow()])
    whole, again = Layers(), Layers()
    fit(whole, [FollowNetwork(""), grow()], tmp_path, max_epochs=4)
    assert get_sizes(whole) == {"first": 9}
    trainer = fit(again, [FollowNetwork(""), grow()], tmp_path, str(tmp_path / "last.ckpt"), max_epochs=5)
    assert trainer.current_epoch == 5 and get_sizes(again) == {"first": 9}
    loaded = load_module(Layers, tmp_path / "last.ckpt")
    x_NCHW, _ = make_data().tensors
    assert torch.equal(loaded(x_NCHW), again.eval()(x_NCHW))


class Keeping(Program):
    """Keeps what it has said, with its graph, as a metric does that is updated by outputs not detached."""

    def __init__(self) -> None:
        super().__init__()
        self.said = self.net(torch.zeros(2, 1, 8, 8))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x_BCHW, y_B = batch
        self.said = self(x_BCHW)
        return F.cross_entropy(self.said, y_B)


@pytest.mark.parametrize("make", [grow, lambda: Reconstruct([0.5], dense=0)])
def test_a_graph_of_an_epoch_that_is_over_hinders_no_change(
    tmp_path: Path, make: Callable[[], L.Callback]
) -> None:
    fit(whole := Keeping(), [make()], tmp_path, max_epochs=4)
    fit(again := Keeping(), [make()], tmp_path, str(tmp_path / "last.ckpt"), max_epochs=4)
    x_NCHW, _ = make_data().tensors
    assert torch.equal(whole.eval()(x_NCHW), again.eval()(x_NCHW))


class Bytes(Program):
    """Takes images as bytes, channels last."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return super().forward(x_BHWC.permute(0, 3, 1, 2).float() / 255)


def test_an_input_is_what_the_modules_forward_makes_of_it() -> None:
    x_NCHW, y_N = make_data().tensors
    bytes_NHWC = (x_NCHW.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)
    loader = DataLoader(TensorDataset(bytes_NHWC, y_N), BATCH)
    module = Bytes()
    L.Trainer(max_epochs=3, callbacks=[grow()], **QUIET).fit(module, loader, loader)  # type: ignore[arg-type]
    assert get_sizes(module)["0"] == 9


class Arm(nn.Module):
    """Is called by its own name for it in training, by a method elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = make_network()[:7], nn.Linear(32, 4)

    def encode(self, x_BCHW: Tensor) -> Tensor:
        return self.encoder(x_BCHW).flatten(1)  # type: ignore[no-any-return]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.encode(x_BCHW))  # type: ignore[no-any-return]


class Encoding(Program):
    """Learns from lists of images, and gives features, as programs that learn without labels do."""

    def __init__(self) -> None:
        super().__init__(Arm())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.net.encode(x_BCHW)  # type: ignore[no-any-return, operator]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x_BCHW, y_B = torch.stack(batch[0]), batch[1]
        assert x_BCHW.dim() == 4
        try:
            logits_BK = self.net(x_BCHW=x_BCHW)
        except Exception as error:  # which must not catch what looks at the input
            raise AssertionError from error
        return F.cross_entropy(logits_BK, y_B)


def test_an_input_is_what_a_training_step_makes_of_a_batch() -> None:
    def collate(samples: Any) -> Any:
        return [x for x, _ in samples], torch.stack([y for _, y in samples])

    loader = DataLoader(make_data(), BATCH, collate_fn=collate)
    module = Encoding()
    prune = PruneByGates(penalty=1e-2)
    trainer = L.Trainer(max_epochs=1, callbacks=[FollowNetwork("net"), prune], **QUIET)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader)
    assert set(get_sizes(module)) == {"encoder.0", "encoder.3"}
    structure = find_structure(module)
    assert structure is not None and structure.example.shape == (BATCH, 1, 8, 8)


class Moved(Program):
    """Scales batches in a hook of the module, which a data module beside it has not."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0].float() / 255, batch[1]]


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        x_NCHW, y_N = make_data().tensors
        return DataLoader(TensorDataset((x_NCHW.clamp(0, 1) * 255).byte(), y_N), BATCH)

    val_dataloader = test_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`")  # so it goes first
def test_hooks_of_the_module_see_what_a_data_module_gives() -> None:
    module = Moved()
    L.Trainer(max_epochs=3, callbacks=[grow()], **QUIET).fit(module, Data())  # type: ignore[arg-type]
    assert get_sizes(module)["0"] == 9


class TwoHeads(Program):
    """Read with a head of its own what lies within its network."""

    def __init__(self) -> None:
        super().__init__()
        layers = make_network()
        self.net = nn.Sequential(layers[:6], layers[6:])
        self.head = nn.Linear(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x_BCHW, y_B = batch
        maps_BCHW = self.net[0](x_BCHW)
        logits_BK = self.head(maps_BCHW.mean((2, 3)))
        return F.cross_entropy(self.net[1](maps_BCHW), y_B) + F.cross_entropy(logits_BK, y_B)


def test_a_program_that_reads_channels_beside_the_forward_is_told_what_to_follow() -> None:
    x_BCHW = make_data()[:2][0]
    with pytest.raises(RuntimeError, match="shapes") as failure:
        fit(TwoHeads(), [FollowNetwork("net", example=x_BCHW), grow()])
    (note,) = failure.value.__notes__
    assert "0.3: 8 → 12" in note and "FollowNetwork('net.…')" in note
    fit(module := TwoHeads(), [FollowNetwork("net.0", example=x_BCHW), grow()])
    assert module.net[0][0].out_channels > 6 and module.net[0][3].out_channels == 8


def test_an_error_that_is_not_about_shapes_stays_as_it_is() -> None:
    def fail(trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 4:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as failure:
        fit(Program(), [grow(), Spy(on_train_batch_start=fail)])
    assert not hasattr(failure.value, "__notes__")


class Boxed(nn.Module):
    """Take images in a container."""

    def __init__(self, key: Any) -> None:
        super().__init__()
        self.body, self.key = make_network(), key

    def forward(self, batch: Any) -> Any:
        return self.body(batch[self.key])


@pytest.mark.parametrize(("wrap", "key"), [(lambda x: {"image": x}, "image"), (lambda x: [x], 0)])
def test_a_network_that_takes_containers_is_refused_with_the_remedy(wrap: Any, key: Any) -> None:
    class Boxing(Program):
        def forward(self, x_BCHW: Tensor) -> Any:
            return self.net(wrap(x_BCHW))

    with pytest.raises(StructureError, match=r"^Boxed is called with a (dict|list): let its forward take"):
        fit(Boxing(Boxed(key)), [grow()], max_epochs=1)


@pytest.mark.parametrize("look", ["validate", "test"])
def test_a_network_is_looked_at_before_it_is_trained(look: str) -> None:
    class Looked(Program):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    trainer = L.Trainer(callbacks=[grow(), PruneByGates(penalty=1e-2)], **QUIET)  # type: ignore[arg-type]
    (found,) = getattr(trainer, look)(Looked(), DataLoader(make_data(), BATCH), verbose=False)
    assert 0 <= found["val/acc"] <= 1


class Late(Program):
    """Makes its data, or its network, when it is set up, or composes the network when it runs."""

    def __init__(self, late: str) -> None:
        super().__init__()
        self.late = late
        if late == "network":
            del self.net
        elif late == "forward":
            self.net = nn.ModuleDict({"body": self.net[:6], "head": self.net[6:]})

    def setup(self, stage: str) -> None:
        self.images = make_data()
        if self.late == "network":
            self.net = make_network()

    def train_dataloader(self) -> Any:
        return DataLoader(self.images, BATCH)

    val_dataloader = train_dataloader


@pytest.mark.parametrize(
    ("late", "remedy"),
    [
        ("data", r"no data before Late is set up \(.*images.*\): give it an example_input_array"),
        ("network", "no child with parameters yet: make its network in __init__"),
        ("forward", r"Late runs the parts of 'net' itself, .*FollowNetwork\(''\) the module"),
    ],
)
def test_what_comes_too_late_is_told_with_its_remedy(late: str, remedy: str) -> None:
    with pytest.raises(TrainingError, match=remedy) as refusal:
        L.Trainer(max_epochs=1, callbacks=[PruneByGates(penalty=1e-2)], **QUIET).fit(Late(late))  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_an_average_that_cannot_follow_is_refused() -> None:
    with pytest.raises(
        TrainingError, match=r"EMAWeightAveraging cannot follow .* \(AverageWeights follows\)"
    ):
        fit(Program(), [EMAWeightAveraging(), grow()])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: [grow(fresh="gradmax")],
        lambda: [TrainJointly([0.5], importance="taylor")],
        lambda: [GrowResolution(Resolution(0.5, 0.7, multiple=1))],
        lambda: [PruneDynamically(start="saliency", saliency=1.0)],
    ],
    ids=["gradmax", "taylor", "resolution", "saliency"],
)
def test_samples_and_images_are_of_the_runs_precision(
    precision: Any, make: Callable[[], list[L.Callback]]
) -> None:
    assert fit(Program(), make(), max_epochs=4, precision=precision).current_epoch == 4


class Bounded(nn.Conv2d):
    """Bound the norm of each kernel, as EEGNet does (arXiv 1611.08024, table 2)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
        return super().forward(x_BCHW)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [grow(), PruneByGates("channel", penalty=5e-2, begin=0.0)],
        lambda: [TrainJointly([0.5])],
        lambda: [PruneDynamically(target=0.5)],
    ],
    ids=["grown", "levels", "dynamic"],
)
def test_a_network_whose_forward_bounds_its_weights_is_trained_as_others_are(
    make: Callable[[], list[L.Callback]],
) -> None:
    net = make_network()
    net[0] = Bounded(1, 6, 3, padding=1, bias=False)
    module = Program(net)
    with torch.no_grad():
        net[0].weight.mul_(10)
    trainer = fit(module, make())
    structure = find_structure(module)
    assert structure is not None and trainer.current_epoch == 6
    x_BCHW = make_data().tensors[0]
    for k in range(len(structure.nets)):
        structure.run(k, x_BCHW)
        assert net[0].weight.flatten(1).norm(dim=1).max() < 0.3 + 1e-5
    module.eval()
    torch.testing.assert_close(compact(net, x_BCHW)(x_BCHW), net(x_BCHW))


def test_values_are_clipped_where_nothing_is_of_elastic_methods(tmp_path: Path) -> None:
    clip = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}
    assert fit(Program(), [Census(str(tmp_path))], max_epochs=1, **clip).global_step == 4


class Adagrad(Program):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters(), lr=1e-2)


def test_an_optimizer_whose_state_begins_before_any_step_is_saved(tmp_path: Path) -> None:
    fit(Adagrad(), [PruneByGates(penalty=1e-2)], tmp_path, max_epochs=2)
    again = Adagrad()
    fit(again, [PruneByGates(penalty=1e-2)], tmp_path, str(tmp_path / "last.ckpt"), max_epochs=3)
    assert again.trainer.global_step == 12


def test_a_batch_may_begin_with_a_number() -> None:
    assert count_samples({"scale": torch.tensor(2.0), "x": torch.zeros(3, 1)}) == 3


class Configured(Program):
    def __init__(self, options: dict[str, int]) -> None:
        super().__init__(make_network(options["width"]))
        self.save_hyperparameters(options)


class Noted(Program):
    def __init__(self, width: int = 6) -> None:
        super().__init__(make_network(width))
        self.save_hyperparameters()
        self.save_hyperparameters({"note": "mine"})


@pytest.mark.parametrize(("kind", "argument"), [(Configured, {"width": 5}), (Noted, 5)])
def test_hyperparameters_are_given_as_the_class_takes_them(
    kind: Callable[[Any], L.LightningModule], argument: Any, tmp_path: Path
) -> None:
    module = kind(argument)
    fit(module, [grow()], tmp_path, max_epochs=3)
    loaded = load_module(type(module), tmp_path / "last.ckpt")
    assert get_sizes(loaded) == get_sizes(module) == {"0": 8, "3": 12}
    x_NCHW, _ = make_data().tensors
    assert F.mse_loss(loaded(x_NCHW), module.eval()(x_NCHW)) == 0


class Remaking(Program):
    """Make the network, or a layer of it, when the data is known."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.layer = layer

    def setup(self, stage: str) -> None:
        if self.layer:
            self.net[3] = nn.Conv2d(6, 8, 3, padding=1, bias=False)
            self.net[0], self.net[1] = nn.Conv2d(1, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        else:
            self.net = make_network(5)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize(
    "make", [grow, *(pytest.param(m, marks=SLOW) for m in (PruneByGates, lambda: PruneDynamically(0.5)))]
)
def test_a_network_that_is_made_again_in_setup_is_refused(make: Any, layer: bool) -> None:
    module = Remaking(layer)
    with pytest.raises(TrainingError, match=r"'net' is no longer the network .* make it .* in __init__"):
        fit(module, [make()])
    assert module.trainer.global_step == 0


def test_a_network_that_is_put_in_place_between_two_fits_is_the_one_that_is_followed() -> None:
    """As one that is compacted, and trained further."""
    module = Program()
    fit(module, [PruneByGates()], max_epochs=1)
    module.net = make_network(5)
    fit(module, [grow()], max_epochs=3)
    structure = find_structure(module)
    assert structure is not None and structure.net is module.net
    assert structure.start_sizes["0"] == 5 and get_sizes(module)["0"] == module.net[0].out_channels == 8
    module.load_state_dict(module.state_dict())  # and no hook of the one before hinders it


class Collected(nn.Module):
    """Says in evaluation what the networks say that it was after each epoch, arXiv 1704.00109."""

    def __init__(self) -> None:
        super().__init__()
        self.core = make_network()
        self.kept = nn.ModuleList()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        nets = [self.core] if self.training or not len(self.kept) else [*self.kept]
        return torch.stack([net(x_BCHW) for net in nets]).mean(0)


class Collecting(Program):
    def __init__(self) -> None:
        super().__init__(Collected())

    def on_train_epoch_end(self) -> None:
        self.net.kept.append(copy.deepcopy(self.net.core))


def test_levels_go_on_beside_modules_that_a_program_adds() -> None:
    program = Collecting()
    fit(program, [TrainJointly([0.5])], max_epochs=3)
    structure = find_structure(program)
    assert structure is not None and structure.levels is not None and len(program.net.kept) == 3
    x_NCHW, _ = make_data().tensors
    assert structure.levels[0].eval()(x_NCHW).shape == (len(x_NCHW), 4)
    program.net.train()
    structure.levels.run(0, x_NCHW).sum().backward()
    assert program.net.core[0].weight.grad.any()


def test_an_average_has_the_modules_that_a_program_adds() -> None:
    trained = []
    for callbacks in ([], [AverageWeights(decay=0.0)]):  # which is what is trained
        torch.manual_seed(0)
        program = Collecting()
        fit(program, callbacks, max_epochs=3)
        trained.append(program.eval())
    x_NCHW, _ = make_data().tensors
    torch.testing.assert_close(*(program(x_NCHW) for program in trained))


def test_a_second_network_is_refused() -> None:
    class Two(Program):
        def __init__(self) -> None:
            super().__init__()
            self.other = make_network()

    with pytest.raises(TrainingError, match=r"FollowNetwork\('other'\) names another network than 'net'"):
        fit(Two(), [FollowNetwork("net"), FollowNetwork("other"), grow()])
    with pytest.raises(TrainingError, match=r"names another network than 'net'.* as the first callback"):
        fit(Program(), [grow(), FollowNetwork("")])


class Holding(Program):
    """Say all arguments to be hyperparameters, the network too."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`")
def test_a_gated_network_among_the_hyperparameters_is_refused_before_a_checkpoint_fails(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        TrainingError, match=r"hyperparameter 'net', .* save_hyperparameters\(ignore=\['net'\]\)"
    ):
        fit(Holding(make_network()), [PruneByGates()], tmp_path)
    assert fit(Holding(make_network()), [PruneByGates()], max_epochs=1).global_step == 4, "nothing is saved"
    assert fit(Holding(make_network()), [grow()], tmp_path, max_epochs=1).global_step == 4


@pytest.mark.parametrize(
    "make",
    [
        grow,
        *(pytest.param(m, marks=SLOW) for m in (lambda: TrainJointly([0.5]), lambda: PruneDynamically(0.5))),
    ],
)
def test_a_trained_module_is_saved_whole(make: Any, tmp_path: Path) -> None:
    module = Program()
    fit(module, [make()], max_epochs=1)
    torch.save(module, tmp_path / "module.pt")
    again = torch.load(tmp_path / "module.pt", weights_only=False)
    x_NCHW, _ = make_data().tensors
    assert torch.equal(again.eval()(x_NCHW), module.eval()(x_NCHW))


@pytest.mark.parametrize(
    "make", [PruneByGates, *(pytest.param(m, marks=SLOW) for m in (grow, lambda: PruneDynamically(0.5)))]
)
def test_what_forked_processes_would_take_along_is_refused(make: Any) -> None:
    """They give back weights for a network that has no such channels, gates or modules."""
    module = Program()
    with pytest.raises(Exception, match=r"TrainingError: .* as they end: set strategy='ddp'"):
        fit(module, [make()], strategy="ddp_fork", devices=1)


@pytest.mark.slow
def test_what_forked_processes_give_back_is_what_they_have_trained() -> None:
    nets = []
    fork = {"strategy": "ddp_fork", "devices": 1, "use_distributed_sampler": False}
    for options in ({}, fork):
        torch.manual_seed(0)
        module = Program()
        fit(module, [Distil(make_network())], max_epochs=1, limit_val_batches=0, **options)
        nets.append(module.net.state_dict())
    assert all(torch.equal(value, nets[1][name]) for name, value in nets[0].items())


def test_a_network_in_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in checks.SHARDED:  # which need several GPUs to be made
        trainer: Any = SimpleNamespace(strategy=object.__new__(kind))
        with pytest.raises(TrainingError, match=rf"{kind.__name__} shares out .* set strategy='ddp'"):
            checks.check_whole(trainer)
    monkeypatch.setattr(checks, "SHARDED", (SingleDeviceStrategy,))
    with pytest.raises(TrainingError, match="SingleDeviceStrategy shares out a network"):
        fit(Program(), [PruneByGates()])


def test_a_teacher_in_another_precision_teaches() -> None:
    nets = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        module, teacher = Program(), make_network()
        fit(module, [Distil(teacher.to(dtype))], max_epochs=1)
        nets.append(module.net.state_dict())
    assert all(torch.equal(value, nets[1][name]) for name, value in nets[0].items())


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize(
    "average",
    [
        lambda: EMAWeightAveraging(decay=0.9),
        pytest.param(lambda: StochasticWeightAveraging(1e-9, 0.2), marks=SLOW),
    ],
)
def test_averages_of_channels_that_change_places_are_refused(average: Any) -> None:
    """With nothing learnt, the network would end as another function than it began as."""
    with pytest.raises(TrainingError, match=r"Averaging cannot follow channels that change places"):
        fit(Program(), [Reconstruct([0.5], dense=0.34, prune=0.33), average()])
    module = Program(nn.Sequential(*(layer for layer in make_network() if type(layer) is not nn.BatchNorm2d)))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    x_NCHW, _ = make_data().tensors
    expected = module(x_NCHW)
    fit(module, [TrainJointly([0.5]), average()], max_epochs=3)
    torch.testing.assert_close(module(x_NCHW), expected)


def test_checkpoints_without_the_average_are_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val/acc", save_weights_only=True)
    with pytest.raises(TrainingError, match=r"not the average .* set save_weights_only=False"):
        fit(Program(), [AverageWeights(), keep], tmp_path)
