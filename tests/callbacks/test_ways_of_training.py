"""However a program groups its weights, steps its optimizers or holds its network, methods act alike."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader

from elastic import Growth, Periodic, Plateau, compact
from elastic.callbacks import (
    AverageWeights,
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
from elastic.pruning.gates import Gate, Grain, iterate_gates
from elastic.training.joining import find_structure
from elastic.training.loading import load_module
from tests.programs import BATCH, QUIET, Killed, Program, Spy, fit, kill_at, make_data, make_network

SEED = 3
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch"),
]


def seed_epochs() -> Spy:
    return Spy(on_train_epoch_start=lambda trainer, _: torch.manual_seed(trainer.current_epoch))


def make(kind: type[Program], *args: Any) -> Program:
    torch.manual_seed(SEED)
    return kind(*args)


def list_gates(net: nn.Module) -> list[Gate]:
    return [gate for _, _, gate in iterate_gates(net)]


def assert_equal(net: nn.Module, expected: nn.Module) -> None:
    ours, theirs = net.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, msg=name)


# --- how weights are looked for ----------------------------------------------------------------------------


class Plain(Program):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ByName(Program):
    """Decay weights, not biases, as many programs of language models do."""

    def configure_optimizers(self) -> Any:
        named = dict(self.net.named_parameters())
        groups = [[p for n, p in named.items() if n.endswith(end)] for end in ("weight", "bias")]
        return torch.optim.SGD([{"params": group} for group in groups], lr=0.05)


class ByKind(Program):
    """Look for parameters among the attributes of layers, as programs of detectors do."""

    def configure_optimizers(self) -> Any:
        layers = [(layer, name) for layer in self.net.modules() for name in ("weight", "bias")]
        values = [getattr(layer, name, None) for layer, name in layers]
        return torch.optim.SGD([value for value in values if isinstance(value, nn.Parameter)], lr=0.05)


class ByLayer(Program):
    """Give each layer's parameters by hand, after its weights have been set in `setup`."""

    def setup(self, stage: str) -> None:
        self.net[0].load_state_dict({"weight": self.net[0].weight.detach().clone()})
        self.net[3].load_state_dict({"weight": self.net[3].weight.detach().clone()})

    def configure_optimizers(self) -> Any:
        conv, norm, _, other, last_norm, *_, linear = self.net
        norms = [*norm.parameters(), *last_norm.parameters()]
        layers = [conv.weight, other.weight, linear.weight, linear.bias, *norms]
        return torch.optim.SGD(layers, lr=0.05)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [ByName, ByKind, ByLayer])
@pytest.mark.parametrize("way", ["whole", "continued", "further"])
def test_gated_weights_are_found_by_the_names_that_the_program_gave_them(
    kind: type[Program], way: str, tmp_path: Path
) -> None:
    def train(kind: type[Program], folder: Path) -> Program:
        callbacks = [seed_epochs(), PruneByGates(penalty=1e-2, grain="kernel")]
        module = make(kind)
        if way == "continued":
            with pytest.raises(Killed):
                fit(module, [*callbacks, kill_at(6)], folder, max_epochs=2)
            module, callbacks = make(kind), [seed_epochs(), PruneByGates(penalty=1e-2, grain="kernel")]
        checkpoint = str(folder / "last.ckpt") if way == "continued" else None
        fit(module, callbacks, folder, checkpoint, max_epochs=2)
        if way == "further":
            fit(module, [seed_epochs(), PruneByGates(penalty=1e-2, grain="kernel")], max_epochs=1)
        return module

    start = make(kind).net[0].weight.detach().clone()
    module, expected = train(kind, tmp_path / "this"), train(Plain, tmp_path / "plain")
    assert not torch.equal(module.net[0].parametrizations.weight.original, start), "it is trained"
    assert_equal(module.net, expected.net)


def test_a_fit_that_is_refused_leaves_the_gates_of_the_one_before() -> None:
    module = make(Plain)
    fit(module, [PruneByGates(penalty=1e-2)], max_epochs=1)
    expected = make(Plain)
    fit(expected, [PruneByGates(penalty=1e-2)], max_epochs=1)
    with pytest.raises(StructureError, match="compact it first"):
        fit(module, [TrainJointly([0.5])], max_epochs=1)
    assert_equal(module.net, expected.net)
    grow = GrowOnSaturation(Plateau(), Growth(factor=1.5, ceiling=2))
    with pytest.raises(TrainingError, match="limit_val_batches=0"):
        fit(module, [grow], limit_val_batches=0)
    assert_equal(module.net, expected.net)


# --- how optimizers are stepped ----------------------------------------------------------------------------


class Generating(Program):
    """Train a generator against the network, by hand."""

    def __init__(self, rates: tuple[float, float], toggles: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(4, 64)
        self.rates, self.toggles = rates, toggles

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        fake_BCHW = self.generator(torch.randn(BATCH, 4)).view(BATCH, 1, 8, 8)
        if self.toggles:
            self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(self.net(fake_BCHW).square().mean())
        first.step()
        if self.toggles:
            self.untoggle_optimizer(first)
        second.zero_grad()
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        scores = [gate.score for gate in list_gates(self.net)]
        expected = torch.autograd.grad(loss, scores, retain_graph=True)
        self.manual_backward(loss)
        for score, gradient in zip(scores, expected, strict=True):
            torch.testing.assert_close(score.grad, gradient)
        second.step()

    def configure_optimizers(self) -> Any:
        sizes = (self.generator, self.net)
        return [torch.optim.SGD(n.parameters(), lr) for n, lr in zip(sizes, self.rates, strict=True)]


@pytest.mark.parametrize("toggles", [True, False])
@pytest.mark.parametrize("rates", [(0.1, 0.0), (0.0, 0.1)])
def test_gates_learn_with_their_own_weights_alone(rates: tuple[float, float], toggles: bool) -> None:
    module = make(Generating, rates, toggles)
    fit(module, [FollowNetwork("net"), PruneByGates(penalty=0.0)], max_epochs=1, limit_val_batches=0)
    moved = any(bool((gate.score != 1).any()) for gate in list_gates(module.net))
    assert moved == (rates[1] > 0)


class Unwrapped(Plain):
    """Step by hand what `configure_optimizers` has returned, without Lightning's wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Skipping(Plain):
    """Drop the gradients of each other step, as Lightning's documentation shows."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        if batch_idx % 2:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        else:
            closure()


def test_gates_learn_however_the_optimizer_is_stepped() -> None:
    module, expected = make(Unwrapped), make(Plain)
    for each in (module, expected):
        fit(each, [PruneByGates(penalty=1e-2, begin=0.0)], max_epochs=1)
    assert_equal(module.net, expected.net)


def test_gradients_of_a_step_that_is_skipped_are_dropped() -> None:
    """The oracle: a run that is given the other batches alone."""
    images = make_data()
    kept = [i for i in range(len(images)) if (i // BATCH) % 2]
    module, expected = make(Skipping), make(Plain)
    fit(module, [PruneByGates(penalty=1e-2, begin=0.0)], max_epochs=1, limit_val_batches=0)
    norms = [layer for layer in module.net if isinstance(layer, nn.BatchNorm2d)]
    loader = DataLoader(torch.utils.data.Subset(images, kept), BATCH)
    fit(expected, [PruneByGates(penalty=1e-2, begin=0.0)], loader=loader, max_epochs=1, limit_val_batches=0)
    for norm, other in zip(norms, (n for n in expected.net if isinstance(n, nn.BatchNorm2d)), strict=True):
        other.load_state_dict({**other.state_dict(), **dict(norm.named_buffers())})  # all batches are seen
    assert_equal(module.net, expected.net)


def test_what_levels_add_learns_after_each_change_of_optimizers() -> None:
    """Reconstruction makes an optimizer a phase; the norms of the level that grows are stepped in each."""
    stepped: list[int] = []

    def note(trainer: Any, module: Any, *_: Any) -> None:
        structure = find_structure(module)
        assert structure is not None
        (own,) = structure.own.optimizers
        if own.state and trainer.current_epoch not in stepped:
            stepped.append(trainer.current_epoch)

    callbacks = [Reconstruct([0.5], dense=0.34, prune=0.33), Spy(on_train_batch_end=note)]
    module = make(Program)
    fit(module, callbacks, max_epochs=6)
    structure = find_structure(module)
    assert structure is not None and len({event["epoch"] for event in structure.timeline}) == 2
    assert stepped == [2, 3]


class Unfreezing(Plain):
    """Train the last layer first; the others come into a group of their own, with all that they have."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[-1].parameters(), lr=0.05, weight_decay=0.1)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            optimizer = self.optimizers(use_pl_optimizer=self.wrapped)
            optimizer.add_param_group({"params": list(self.net[:-1].parameters())})


@pytest.mark.parametrize("wrapped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gates_of_layers_that_are_unfrozen_stay_out_of_the_programs_optimizer(wrapped: bool) -> None:
    """It would step them a second time, and shrink their scores."""
    module = make(Unfreezing)
    module.wrapped = wrapped
    trainer = fit(module, [PruneByGates(penalty=0.0)], max_epochs=2, limit_val_batches=0)
    first, second = (list(map(id, group["params"])) for group in trainer.optimizers[0].param_groups)
    scores = {id(gate.score) for gate in list_gates(module.net)}
    assert scores and second and not scores & {*first, *second}
    assert {*first, *second} | scores == set(map(id, module.net.parameters()))


def test_gates_without_an_optimizer_are_refused() -> None:
    module = make(Plain)
    module.configure_optimizers = lambda: None  # type: ignore[method-assign]
    with (
        pytest.warns(UserWarning, match="no optimizer"),
        pytest.raises(TrainingError, match="let configure_optimizers return an optimizer"),
    ):
        fit(module, [PruneByGates()], max_epochs=1)


class Sharpness(torch.optim.SGD):
    """Hold another optimizer that keeps the state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)


class ScheduleFree(torch.optim.SGD):
    """Hold other weights for evaluation (arXiv 2405.15682)."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)

    def train(self) -> None:
        """Take the weights that are trained."""

    def eval(self) -> None:
        """Take those that are evaluated."""


@pytest.mark.parametrize("make_optimizer", [Sharpness, ScheduleFree, torch.optim.LBFGS])
@pytest.mark.parametrize("method", ["growth", "gates"])
def test_an_optimizer_that_cannot_be_followed_is_refused_before_training(
    make_optimizer: Any, method: str
) -> None:
    module = make(Program)
    module.configure_optimizers = lambda: make_optimizer(module.parameters())  # type: ignore[method-assign]
    grow = GrowOnSaturation(Periodic(1), Growth(factor=1.5, ceiling=2))
    with pytest.raises(TrainingError, match=f"{make_optimizer.__name__} .*another"):
        fit(module, [grow if method == "growth" else PruneByGates()])
    assert module.trainer.global_step == 0


class Whitening(torch.optim.SGD):
    """Keep a matrix for the rows of each tensor, from the first step on."""

    def step(self, closure: Any = None) -> Any:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[parameter]["rows"] = torch.eye(len(parameter))
        return super().step(closure)


def test_an_optimizer_whose_state_cannot_follow_is_refused_before_training() -> None:
    module = make(Program)
    module.configure_optimizers = lambda: Whitening(module.parameters(), 0.1)  # type: ignore[method-assign]
    with pytest.raises(StructureError, match=r"Whitening keeps 'rows' of shape .* cannot follow: use SGD"):
        fit(module, [PruneByGates()])
    assert module.trainer.global_step == 0


# --- how the network is held and called --------------------------------------------------------------------


class Steady(Plain):
    """Keep the norms of the network as they are."""

    def on_train_epoch_start(self) -> None:
        self.net.eval()


def test_a_loss_is_added_whatever_mode_the_network_is_in() -> None:
    """The oracle: a program that adds it itself."""
    torch.manual_seed(SEED + 1)
    teacher = make_network().eval()

    class ByHand(Steady):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                taught_BK = teacher(batch[0]).softmax(1)
            logits_BK = self(batch[0])
            divergence = F.kl_div(logits_BK.log_softmax(1), taught_BK, reduction="batchmean")
            return F.cross_entropy(logits_BK, batch[1]) + divergence

    module, expected = make(Steady), make(ByHand)
    fit(module, [Distil(teacher, temperature=1.0)], max_epochs=2)
    fit(expected, [], max_epochs=2)
    for value, other in zip(module.net.parameters(), expected.net.parameters(), strict=True):
        torch.testing.assert_close(value, other)


def test_modules_that_are_trained_alone_learn_to_be_sparing() -> None:
    engaged = []
    for gain in (0.0, 20.0):
        prune = PruneDynamically(gain, begin=0.0, end=0.1, rate=20.0, modules_only=True)
        fit(make(Program), [prune], max_epochs=4)
        engaged.append(float(prune.costs[0].fraction("kernels")))
    assert engaged[1] < engaged[0] - 0.1


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = make_network()

    def forward(self, x_BCHW: Tensor, scale_B1: Tensor | None = None) -> Tensor:
        logits_BK: Tensor = self.body(x_BCHW)
        return logits_BK if scale_B1 is None else logits_BK * scale_B1


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("method", ["joint", "distil"])
def test_levels_and_teachers_are_given_all_inputs(method: str, by_name: bool) -> None:
    """Scaled by 0, levels, teacher and network agree; not so where one of them is not scaled."""
    terms = []

    class Zero(Plain):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            scale_B1 = torch.zeros(len(x_BCHW), 1)
            logits_BK: Tensor
            logits_BK = self.net(x_BCHW, scale_B1=scale_B1) if by_name else self.net(x_BCHW, scale_B1)
            return logits_BK

    callback = TrainJointly([0.5]) if method == "joint" else Distil(Scaled())
    compute = callback.compute_loss

    def note(*args: Any, **named: Any) -> Tensor:
        terms.append(compute(*args, **named))
        return terms[-1]

    callback.compute_loss = note  # type: ignore[method-assign]
    fit(make(Zero, Scaled()), [callback], max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    expected = math.log(4) if method == "joint" else 0.0  # the cross entropy, and the divergence
    torch.testing.assert_close(torch.stack(terms).detach(), torch.full((2,), expected), rtol=0, atol=1e-6)


class Answering(Program):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.tested = self(batch[0])

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


def test_predictions_are_those_of_the_network_with_its_modules() -> None:
    module = make(Answering)
    trainer = fit(module, [PruneDynamically(5.0, begin=0.0, end=0.1, activation="scale")], max_epochs=2)
    loader = DataLoader(torch.utils.data.Subset(make_data(1), range(BATCH)), BATCH)
    trainer.test(module, loader, verbose=False)
    (predicted,) = trainer.predict(module, loader)  # type: ignore[misc]
    torch.testing.assert_close(predicted, module.tested, rtol=0, atol=0)
    structure = find_structure(module)
    assert structure is not None
    assert not torch.equal(module.net(next(iter(loader))[0]), module.tested), "the plain network's differ"


class Momentum(Plain):
    """Keep a network that follows the trained one, and learn from it, as programs without labels do."""

    def __init__(self, momentum: float = 0.0) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.momentum = momentum

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            taught_BK = self.target(batch[0])
        return super().training_step(batch, batch_idx) + (self.net(batch[0]) - taught_BK).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        for own, other in zip(self.net.parameters(), self.target.parameters(), strict=True):
            other.data.lerp_(own.data, 1 - self.momentum)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)


def grow_and_prune(grain: Grain = "weight") -> list[L.Callback]:
    grow = GrowOnSaturation(Periodic(1), Growth(factor=1.5, ceiling=2))
    return [FollowNetwork("net", copies=["target"]), grow, PruneByGates(grain, penalty=5e-2, begin=0.0)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("grain", ["weight", "channel"])
def test_a_network_that_a_program_keeps_in_step_follows_each_change(grain: Grain, tmp_path: Path) -> None:
    """Without momentum it is the trained one after each step, gates, growth, removed channels and all."""
    module = make(Momentum)
    fit(module, [*grow_and_prune(grain), AverageWeights(decay=0.5)], tmp_path)
    structure = find_structure(module)
    assert structure is not None and {row["why"].split(":")[0] for row in structure.timeline} >= {"grow"}
    loaded = load_module(Momentum, tmp_path / "last.ckpt")
    for each in (module, loaded):
        for own, other in zip(each.net.parameters(), each.target.parameters(), strict=True):
            assert own.shape == other.shape
    x_NCHW, _ = make_data().tensors
    module.eval()
    assert torch.equal(loaded.target(x_NCHW), module.target(x_NCHW))
    again = make(Momentum)
    fit(again, grow_and_prune(grain))
    for own, other in zip(again.net.parameters(), again.target.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_run_that_keeps_a_network_in_step_goes_on_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    def train(folder: Path, *more: L.Callback, checkpoint: Path | None = None) -> Momentum:
        module = make(Momentum, 0.9)
        path = None if checkpoint is None else str(checkpoint)
        fit(module, [seed_epochs(), *grow_and_prune(), *more], folder, path)
        return module

    whole, parts = train(tmp_path / "whole"), tmp_path / "parts"
    with pytest.raises(Killed):
        train(parts, kill_at(14))
    again = train(parts, checkpoint=parts / "last.ckpt")
    assert_equal(again.net, whole.net)
    assert_equal(again.target, whole.target)


@pytest.mark.parametrize("method", [PruneByGates, partial(AverageWeights, decay=0.5)])
def test_a_run_in_half_precision_goes_on_as_if_it_had_not_been_killed(
    method: Callable[[], L.Callback], tmp_path: Path
) -> None:
    """Lightning loads a checkpoint first, and converts the module then: what is not in it stays behind."""

    def train(folder: Path, *more: L.Callback, checkpoint: str | None = None) -> Program:
        module = make(Plain)
        fit(module, [seed_epochs(), method(), *more], folder, checkpoint, precision="bf16-true")
        return module

    whole, parts = train(tmp_path / "whole"), tmp_path / "parts"
    with pytest.raises(Killed):
        train(parts, kill_at(14))
    assert_equal(train(parts, checkpoint=str(parts / "last.ckpt")).net, whole.net)


class MaxNorm(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.renorm(2, 0, 0.5)


def bound_rows(layer: nn.Module) -> nn.Module:
    return register_parametrization(layer, "weight", MaxNorm())


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("norm", "grain"),
    [
        (parametrizations.weight_norm, "weight"),
        (parametrizations.weight_norm, "channel"),
        (nn.utils.weight_norm, None),  # a hook, whose weights have no gates
        (parametrizations.spectral_norm, "weight"),
        (parametrizations.spectral_norm, "channel"),
        (nn.utils.spectral_norm, None),
        (bound_rows, "weight"),
        (bound_rows, "channel"),
    ],
)
def test_a_network_with_normed_weights_grows_is_pruned_and_goes_on_as_if_it_had_not_been_killed(
    norm: Callable[[nn.Module], nn.Module], grain: Grain | None, tmp_path: Path
) -> None:
    def train(folder: Path, *more: L.Callback, checkpoint: str | None = None) -> Program:
        module = make(Plain)
        for layer in module.net:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                norm(layer)
        _, grow, prune = grow_and_prune(grain or "weight")
        methods = [grow, *([prune] if grain else []), AverageWeights(decay=0.5)]
        fit(module, [seed_epochs(), *methods, *more], folder, checkpoint)
        return module

    whole, parts = train(tmp_path / "whole"), tmp_path / "parts"
    with pytest.raises(Killed):
        train(parts, kill_at(14))
    again = train(parts, checkpoint=str(parts / "last.ckpt"))
    assert_equal(again.net, whole.net)
    x_NCHW, _ = make_data().tensors
    torch.testing.assert_close(compact(again.net, x_NCHW[:2])(x_NCHW), again.eval().net(x_NCHW))


@pytest.mark.parametrize("method", [PruneByGates("weight", penalty=5e-2, begin=0.0), Reconstruct([0.5])])
def test_a_copy_that_follows_nothing_is_named(method: L.Callback, caplog: pytest.LogCaptureFixture) -> None:
    """A teacher may stay, so it is no error; pairs of parameters that have become wrong fail, or do not."""
    module = make(Momentum)
    try:
        fit(module, [FollowNetwork("net"), method])
    except (RuntimeError, ValueError) as error:
        assert "FollowNetwork('net', copies=['target'])" in error.__notes__[-1]
    assert "'target' has the weights of 'net'" in caplog.text and "copies=['target'])" in caplog.text


@pytest.mark.parametrize(
    ("follow", "method"),
    [
        (FollowNetwork("net", copies=["target"]), PruneByGates()),
        (FollowNetwork("net"), TrainJointly([0.5])),  # changes nothing that the program sees
    ],
)
def test_nothing_is_said_of_a_copy_that_follows_or_need_not(
    follow: L.Callback, method: L.Callback, caplog: pytest.LogCaptureFixture
) -> None:
    fit(make(Momentum), [follow, method])
    assert "has the weights of" not in caplog.text


def test_a_network_that_is_no_copy_is_refused() -> None:
    module = make(Momentum)
    module.target = make_network(5)
    with pytest.raises(StructureError, match="'target' is no copy of 'net'"):
        fit(module, grow_and_prune())


@pytest.mark.parametrize(
    "method",
    [
        partial(GrowOnSaturation, Periodic(every=1), Growth(factor=1.5)),
        PruneByGates,
        partial(TrainJointly, [0.5]),
        partial(Reconstruct, [0.5]),
        partial(PruneDynamically, target=0.5),
    ],
)
def test_what_is_saved_after_the_run_is_loaded_as_it_was(
    method: Callable[[], L.Callback], tmp_path: Path
) -> None:
    """Its epoch is one behind the last, as for a tuner that keeps the run while it tries another."""
    module, again = make(Plain), make(Plain)
    fit(module, [method()]).save_checkpoint(tmp_path / "ended.ckpt")
    fit(again, [method()], checkpoint=str(tmp_path / "ended.ckpt"))
    assert_equal(again.net, module.net)
    structure = find_structure(again)
    assert structure is not None and structure.level == len(structure.levels or [0]) - 1


class Compiling(Plain):
    """Compile the network when the run is set up, as templates of whole projects do."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.net = torch.compile(self.net, backend="eager")


class CompilingAtOnce(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Compiling, CompilingAtOnce])
def test_a_network_in_torch_compiles_wrapper_is_followed(kind: type[Plain], tmp_path: Path) -> None:
    def train(kind: type[Plain], folder: Path) -> Plain:
        grow = GrowOnSaturation(Periodic(1), Growth(factor=1.5, ceiling=2))
        module = make(kind)
        fit(module, [seed_epochs(), grow, PruneByGates(penalty=1e-2)], folder, max_epochs=2)
        again = make(kind)
        grow = GrowOnSaturation(Periodic(1), Growth(factor=1.5, ceiling=2))
        callbacks = [seed_epochs(), grow, PruneByGates(penalty=1e-2)]
        fit(again, callbacks, folder, str(folder / "last.ckpt"), max_epochs=3)
        return again

    module, expected = train(kind, tmp_path / "this"), train(Plain, tmp_path / "plain")
    assert_equal(module.net._orig_mod, expected.net)
    loaded = load_module(kind, tmp_path / "this" / "last.ckpt")
    x_NCHW, _ = make_data().tensors
    assert torch.equal(loaded(x_NCHW), expected.eval()(x_NCHW))


@pytest.mark.parametrize("kind", [Compiling, CompilingAtOnce])
def test_levels_learn_in_torch_compiles_wrapper(kind: type[Plain]) -> None:
    module, expected = make(kind), make(Plain)
    for each in (module, expected):
        fit(each, [TrainJointly([0.5])], max_epochs=1)
    assert_equal(module.net._orig_mod, expected.net)


def test_a_network_that_is_compiled_with_its_caller_cannot_run_in_levels() -> None:
    module = make(Program, nn.Sequential(make_network(), nn.Identity()))
    module.net.compile(backend="eager")
    with pytest.raises(TrainingError, match=r"what calls 'net.0' is compiled, .* by its own compile\(\)"):
        fit(module, [FollowNetwork("net.0"), TrainJointly([0.5])])
    assert module.trainer.global_step == 0


class Passing(Plain):
    """Run the network past its call, in one of the ways that there are."""

    def __init__(self, way: str) -> None:
        super().__init__()
        compiled = torch.compile(lambda x_BCHW: self.net(x_BCHW), backend="eager")
        parts = lambda x_BCHW: self.net[1:](self.net[0](x_BCHW))  # noqa: E731
        self.run = {"compiled": compiled, "forward": self.net.forward, "parts": parts}[way]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.run(x_BCHW)
        return logits_BK


PAST = {
    "joint": lambda: TrainJointly([0.5]),
    "distil": lambda: Distil(make_network()),
    "dynamic": lambda: PruneDynamically(0.5),
}


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("distil", "compiled"),
        ("joint", "forward"),
        ("dynamic", "parts"),
        *(
            pytest.param(m, w, marks=pytest.mark.slow)
            for m, w in [("joint", "compiled"), ("dynamic", "compiled")]
        ),
    ],
)
def test_a_network_that_is_run_past_its_call_is_refused_before_a_step(method: str, way: str) -> None:
    """Levels, modules and teachers would have no part in the run."""
    module = make(Passing, way)
    with pytest.raises(TrainingError, match=r"runs 'net' without calling it: .* by its own compile\(\)"):
        fit(module, [PAST[method]()], max_epochs=1)
    assert module.trainer.global_step == 0


def test_a_step_that_does_not_train_the_network_is_none_past_its_call() -> None:
    """As in a program that begins each epoch with another network."""

    class Alternating(Generating):
        def on_validation_model_zero_grad(self) -> None:
            """Keep the network's gradients, which the next epoch begins with."""

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            if batch_idx < 2:
                self.manual_backward(self.generator(torch.ones(4)).sum())
                first.step()
            else:
                self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
                second.step()

    module = make(Alternating, (0.1, 0.1), False)
    trainer = fit(module, [FollowNetwork("net"), Distil(make_network())], max_epochs=2)
    assert trainer.current_epoch == 2


# --- runs that an error ends -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_callback",
    [
        lambda: GrowResolution(Resolution(0.5, 0.9, multiple=1)),
        lambda: PruneDynamically(0.5, start="saliency", saliency=1.0),
        lambda: Distil(make_network()),
    ],
    ids=["resolution", "dynamic", "distil"],
)
def test_a_run_that_an_error_ends_leaves_the_network_to_the_program(make_callback: Any) -> None:
    """As it was called before: in the next run it is given whole images, and nothing watches it."""
    module = make(Plain)
    with pytest.raises(Killed):
        fit(module, [make_callback(), kill_at(2)])
    assert module.net._compiled_call_impl is None
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.net.modules())
    sizes: set[int] = set()
    module.net[0].register_forward_pre_hook(lambda _, inputs: sizes.add(inputs[0].shape[-1]))
    fit(module, [Distil(make_network())], max_epochs=1, limit_val_batches=0)
    assert sizes == {8}


def test_an_error_in_validation_saves_what_is_trained_beside_its_average(tmp_path: Path) -> None:
    def end(trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            raise Killed

    trained: list[dict[str, Any]] = []
    before = Spy(on_validation_start=lambda _, m: trained.append(copy.deepcopy(m.state_dict())))
    keep = ModelCheckpoint(tmp_path, "killed", save_on_exception=True, every_n_epochs=100)
    module = make(Plain)
    callbacks = [before, AverageWeights(decay=0.9), Spy(on_validation_batch_start=end), keep]
    trainer = L.Trainer(max_epochs=2, callbacks=callbacks, **{**QUIET, "enable_checkpointing": True})  # type: ignore[arg-type]
    with pytest.raises(Killed):
        trainer.fit(module, DataLoader(make_data(), BATCH), DataLoader(make_data(1), BATCH))
    saved = torch.load(tmp_path / "killed.ckpt", weights_only=True)
    for name, value in trained[-1].items():
        if isinstance(value, Tensor):
            assert torch.equal(saved["current_model_state"][name], value)
            assert torch.equal(module.state_dict()[name], value)
    assert not torch.equal(saved["state_dict"]["net.0.weight"], trained[-1]["net.0.weight"])


@pytest.mark.filterwarnings(
    "ignore:.*called without a model", "ignore:.*there is no last checkpoint available"
)
@pytest.mark.parametrize("callback", [AverageWeights, PruneByGates])
def test_a_refusal_is_said_where_errors_are_followed_by_a_checkpoint(callback: Any, tmp_path: Path) -> None:
    callbacks = [callback(), OnExceptionCheckpoint(tmp_path)]
    options = {**QUIET, "enable_checkpointing": True, "max_epochs": 1}
    trainer = L.Trainer(callbacks=callbacks, **options)  # type: ignore[arg-type]
    module = make(Plain)
    module.second = make_network()
    with pytest.raises(TrainingError, match="2 children with parameters"):
        trainer.fit(module, *[DataLoader(make_data(), BATCH)] * 2)
