"""Two lines make a module elastic that knows nothing of this library, whatever its training loop does."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.distributions import Normal

from elastic import Growth, Periodic, Plateau
from elastic.callbacks import (
    AverageWeights,
    Census,
    Distil,
    FollowNetwork,
    GrowOnSaturation,
    GrowResolution,
    PruneByGates,
    PruneByMagnitude,
    PruneDynamically,
    Reconstruct,
    TrainJointly,
)
from elastic.errors import OptionError, StructureError, TrainingError
from elastic.growth import Resolution
from elastic.models import resnet20
from elastic.pruning import compact
from elastic.pruning.gates import iterate_gates
from elastic.training.imitation import compare_outputs
from elastic.training.joining import find_structure
from elastic.training.structure import Structure
from tests.programs import (
    BATCH,
    IMAGES,
    Adversary,
    Killed,
    Program,
    Spy,
    fit,
    kill_at,
    make_data,
    make_network,
)

Callbacks = Callable[[Path], Sequence[L.Callback]]
SEED = 3
STEPS = {"max_epochs": -1, "max_steps": 24}


def grow() -> GrowOnSaturation:
    return GrowOnSaturation(Periodic(2), Growth(factor=1.5, ceiling=2), until=0.7)


SCHEDULES: dict[str, Callbacks] = {
    "growth": lambda _: [grow()],
    "gates": lambda _: [PruneByGates(budget=250, penalty=1e-2)],
    "growth+gates": lambda folder: [Census(str(folder)), grow(), PruneByGates(grain="channel", penalty=1e-2)],
    "magnitude": lambda _: [PruneByMagnitude(budget=250)],
    "joint": lambda _: [TrainJointly([0.5])],
    "reconstruct": lambda _: [Reconstruct([0.5], dense=0.34, prune=0.33)],
    "dynamic": lambda _: [PruneDynamically(gain=0.5)],
    "ema+growth+gates": lambda _: [AverageWeights(decay=0.9), grow(), PruneByGates(penalty=1e-2)],
    "distil": lambda _: [Distil(make_network().eval())],
    "resolution+growth": lambda _: [GrowResolution(Resolution(0.5, 0.7, multiple=1)), grow()],
}


MOST = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("growth", "gates") else name for name in SCHEDULES
]

# Lightning's advice to those who continue a run in its folder, or within an epoch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def structure_of(module: L.LightningModule) -> Structure:
    structure = find_structure(module)
    assert structure is not None
    return structure


def make_program(kind: type[Program] = Program, net: nn.Module | None = None) -> Program:
    torch.manual_seed(SEED)
    return kind() if net is None else kind(net)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", MOST)
def test_a_run_killed_and_continued_is_the_whole_run(name: str, tmp_path: Path) -> None:
    """Bit for bit, by a fresh module and fresh callbacks, killed within an epoch."""
    assert_continued_is_whole(name, tmp_path, batch=18)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("growth+gates", {"every": 4}),
        pytest.param("reconstruct", {"every": 4}, marks=pytest.mark.slow),
        ("magnitude", {"every": 4, "limit_val_batches": 0}),
        pytest.param("growth+gates", {"every": 4, **STEPS}, marks=pytest.mark.slow),
        ("growth+gates", {"at_epoch_end": True, "batch": 13, **STEPS}),  # grace is not over
    ],
    ids=["growth", "levels", "not validated", "steps", "ended"],
)
def test_a_run_continued_after_the_last_batch_of_an_epoch_is_the_whole_run(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Checkpoints are written before the epoch is validated and ended, or when it has ended."""
    assert_continued_is_whole(name, tmp_path, **{"batch": 17, **options})


def assert_continued_is_whole(name: str, tmp_path: Path, batch: int, **options: Any) -> None:
    states: list[Any] = []

    def run(folder: Path, *more: L.Callback, checkpoint: str | None = None) -> Program:
        module = make_program()
        torch.manual_seed(SEED + (checkpoint is not None))
        callbacks = SCHEDULES[name](folder)  # a teacher, too, is the same in each
        seeds = Spy(on_train_epoch_start=lambda t, m: torch.manual_seed(t.current_epoch))
        fit(module, [seeds, *callbacks, *more], folder, checkpoint, **options)
        states.append([callback.state_dict() for callback in callbacks if not isinstance(callback, Census)])
        return module

    if name == "distil":
        teacher = make_network().eval()
        SCHEDULES[name] = lambda _: [Distil(teacher)]
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "parts", kill_at(batch))
    again = run(tmp_path / "parts", checkpoint=str(tmp_path / "parts" / "last.ckpt"))
    expected, result = whole.state_dict(), again.state_dict()
    assert list(expected) == list(result)
    for key, value in expected.items():
        same = torch.equal(value, result[key]) if isinstance(value, torch.Tensor) else value == result[key]
        assert same, key
    assert structure_of(whole).timeline == structure_of(again).timeline
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_network_changes_as_asked_and_still_learns(name: str, tmp_path: Path) -> None:
    module = make_program()
    fit(module, SCHEDULES[name](tmp_path), max_epochs=8)
    structure = structure_of(module)
    if "growth" in name:
        assert any(event["why"].startswith("grow") for event in structure.timeline)
    x_NCHW, y_N = make_data(1).tensors
    net = (
        compact(structure.net, structure.example)
        if any(iterate_gates(structure.net))
        else structure.net.eval()
    )
    assert (net(x_NCHW).argmax(1) == y_N).float().mean() > 0.6


def test_a_restart_within_an_epoch_leaves_a_network_that_is_not_trained(tmp_path: Path) -> None:
    fit(make_program(), [PruneDynamically(0.5, modules_only=True)], tmp_path, every=6, max_epochs=2)
    again, before = make_program(), make_program()
    last = str(tmp_path / "last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] % 4
    fit(again, [PruneDynamically(0.5, modules_only=True)], tmp_path, last, 6, max_epochs=2)
    for key, value in before.net.state_dict().items():
        assert torch.equal(value, structure_of(again).net.state_dict()[key]), key


def test_a_restart_within_an_epoch_counts_all_of_it(tmp_path: Path) -> None:
    fit(make_program(), [Census(str(tmp_path))], tmp_path, every=6, max_epochs=2)
    again = Census(str(tmp_path))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
    seen: list[int] = []
    spy = Spy(on_train_batch_end=lambda *_: seen.append(BATCH))
    fit(make_program(), [again, spy], tmp_path, str(tmp_path / "last.ckpt"), 6, max_epochs=2)
    once = Census(str(tmp_path))
    fit(make_program(), [once], max_epochs=1)
    assert again.macs_training * IMAGES == once.macs_training * (6 * BATCH + sum(seen))


class Refuses(PruneByGates):
    """A user's own, which answers the question what it cannot be in one run with."""

    def check(self, trainer: L.Trainer) -> None:
        raise TrainingError(f"not beside {len(trainer.callbacks)} others: leave it out")  # type: ignore[attr-defined]


def test_every_callback_is_asked_what_it_cannot_be_with() -> None:
    with pytest.raises(TrainingError, match="not beside"):
        fit(make_program(), [PruneByGates(penalty=1e-2), Refuses()])


def test_two_averages_are_refused() -> None:
    with pytest.raises(
        TrainingError, match=r"StochasticWeightAveraging and AverageWeights would each replace"
    ):
        fit(make_program(), [StochasticWeightAveraging(1e-2), AverageWeights()])


class ByName(Program):
    """Calls its network by the names of its arguments, of which some have a default."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = make_network()

        def forward(self, images: torch.Tensor, scale: float = 1.0) -> Any:
            return self.layers(images * scale)

    def __init__(self) -> None:
        super().__init__(self.Network())

    def forward(self, x_BCHW: torch.Tensor) -> Any:
        return self.net(images=x_BCHW)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["growth+gates", "joint", "reconstruct", "dynamic", "distil"])
def test_a_network_may_be_called_by_names(name: str, tmp_path: Path) -> None:
    module = ByName()
    example = make_data().tensors[0][:2]
    fit(module, [FollowNetwork("net", example), *SCHEDULES[name](tmp_path)], max_epochs=3)
    assert module(example).isfinite().all()


class Described(Program):
    """A network that gives more than scores: an index, a number, a None."""

    class Network(ByName.Network):
        def forward(self, x: torch.Tensor) -> Any:
            scores = self.layers(x)
            return {"scores": scores, "class": scores.argmax(1), "loss": None, "classes": 4}

    def __init__(self) -> None:
        super().__init__(self.Network())

    def forward(self, x_BCHW: torch.Tensor) -> Any:
        return self.net(x_BCHW)["scores"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name", ["growth+gates", "joint", "reconstruct", "dynamic", "resolution+growth", "distil"]
)
def test_a_network_may_give_more_than_scores(name: str, tmp_path: Path) -> None:
    module = Described()
    callbacks = [Distil(Described.Network().eval())] if name == "distil" else SCHEDULES[name](tmp_path)
    fit(module, callbacks, max_epochs=3)
    assert module(make_data().tensors[0]).isfinite().all()


class Variational(Program):
    """A network that draws its maps, and gives a distribution; it lies beside a head."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.rest = make_network()[:3], make_network()[3:]

        def forward(self, x: torch.Tensor) -> Normal:
            maps = Normal(self.start(x), torch.full((1, 1, 1, 1), 0.1)).rsample()
            return Normal(self.rest(maps), 1.0)

    def __init__(self) -> None:
        super().__init__(self.Network())
        self.head = nn.Linear(4, 4)

    def forward(self, x_BCHW: torch.Tensor) -> Any:
        return self.head(self.net(x_BCHW).mean)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["ema+growth+gates", "joint", "reconstruct", "dynamic"])
def test_a_network_may_draw_and_give_distributions(name: str, tmp_path: Path) -> None:
    module = Variational()
    fit(module, [FollowNetwork("net"), *SCHEDULES[name](tmp_path)], max_epochs=3)
    assert module(make_data().tensors[0]).isfinite().all()


class Auxiliary(nn.Module):
    """Look at maps through another head in training.

    Args:
        is_first: whether the other head's scores come before the network's.
    """

    def __init__(self, is_first: bool = False) -> None:
        super().__init__()
        self.start, self.rest = make_network()[:3], make_network()[3:]
        self.early = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 7))
        self.is_first = is_first

    def forward(self, x: torch.Tensor) -> Any:
        y = self.start(x)
        scores = self.rest(y)
        if not self.training:
            return scores
        others = self.early(y)
        return (others, scores) if self.is_first else (scores, others)


class WithAuxiliary(Program):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores, others = self(batch[0])
        return F.cross_entropy(scores, batch[1]) + 0.3 * F.cross_entropy(others, batch[1])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["growth+gates", "joint", "reconstruct", "dynamic", "distil"])
def test_a_network_may_have_more_heads_in_training(name: str, tmp_path: Path) -> None:
    module = WithAuxiliary(Auxiliary())
    before = module.net.early[-1].weight.detach().clone()
    fit(module, SCHEDULES[name](tmp_path), max_epochs=3)
    assert module.eval()(make_data().tensors[0]).shape == (128, 4)
    assert not torch.equal(module.net.early[-1].weight, before)


def test_a_teacher_teaches_the_outputs_of_evaluation() -> None:
    message = r"of \(7,\), \(4,\) in training, .* \(4,\) in evaluation.*begin with"
    with pytest.raises(TrainingError, match=message):
        fit(WithAuxiliary(Auxiliary(is_first=True)), [Distil(make_network().eval())])
    scores, others, target = torch.randn(2, 4), torch.randn(2, 7), torch.randn(2, 4)
    losses = [compare_outputs(output, target, "classes") for output in ((scores, others), scores)]
    assert torch.equal(*losses)


class Scored(Program):
    """A network that gives one score an image, and a program that knows it."""

    def __init__(self, *outputs: int) -> None:
        super().__init__(nn.Sequential(*make_network()[:-1], nn.Linear(32, 1), *map(nn.Flatten, outputs)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x_BCHW, y_B = batch
        return F.binary_cross_entropy_with_logits(self(x_BCHW).flatten(), (y_B > 1).float())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", ((self(batch[0]).flatten() > 0) == (batch[1] > 1)).float().mean())


@pytest.mark.parametrize("dims", [(), (0,)], ids=["(B, 1)", "(B,)"])
def test_levels_learn_a_single_score_too(dims: tuple[int, ...]) -> None:
    """As a choice between classes it would be sure of the only one, and teach nothing."""
    module = Scored(*dims)
    x_NCHW, y_N = make_data(1).tensors
    fit(module, [TrainJointly([0.5])], max_epochs=12)
    small = structure_of(module).nets[0].eval()
    assert ((small(x_NCHW).flatten() > 0) == (y_N > 1)).float().mean() > 0.8


def test_a_penalty_holds_from_the_first_step_after_a_restart_within_an_epoch(tmp_path: Path) -> None:
    penalties: list[tuple[int, float]] = []
    spy = Spy(
        on_train_batch_end=lambda t, m, *_: penalties.append(
            (t.global_step, float(t.callback_metrics["gates/penalty"]))
        )
    )
    pruning = PruneByGates(penalty=1e-2, begin=0.0)
    with pytest.raises(Killed):
        fit(make_program(), [pruning, kill_at(7)], tmp_path, every=6)
    last = str(tmp_path / "last.ckpt")
    fit(make_program(), [PruneByGates(penalty=1e-2, begin=0.0), spy], tmp_path, last, every=6)
    assert penalties[0] == (7, pytest.approx(1e-2))


def test_every_parameter_keeps_its_group_through_growth_in_width_and_depth() -> None:
    class Grouped(Program):
        def configure_optimizers(self) -> Any:
            stem = list(self.net.conv.parameters())
            rest = [p for p in self.net.parameters() if all(p is not s for s in stem)]
            return torch.optim.SGD([{"params": stem, "lr": 1e-4}, {"params": rest}], lr=1e-2, momentum=0.9)

    module = make_program(Grouped, resnet20(width=2, in_channels=1, classes=4))
    growth = GrowOnSaturation(Periodic(1), Growth(factor=1.5, ceiling=1.5, blocks=1), until=0.7)
    trainer = fit(module, [growth], max_epochs=3)
    stem, rest = trainer.optimizers[0].param_groups
    assert [id(p) for p in stem["params"]] == [id(module.net.conv.weight)]
    expected = [id(p) for p in module.net.parameters() if p is not module.net.conv.weight]
    assert [id(p) for p in rest["params"]] == expected, (
        "new blocks are in it, in the order of a network made so"
    )
    assert len(module.net.stage1) == 4


class Residual(nn.Module):
    """Begins with its norm, and ends in a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, 1, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.outer(self.inner(self.norm(x_BCHW).relu()).relu())  # type: ignore[no-any-return]


class Lists(nn.Module):
    """Goes through its blocks in a loop, and through others side by side with its own layers."""

    def __init__(self, looped: bool = True) -> None:
        super().__init__()
        self.stem, self.head, self.looped = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4), looped
        self.blocks, self.beside = (nn.ModuleList(Residual() for _ in range(2)) for _ in range(2))
        self.pools = nn.ModuleList([nn.MaxPool2d(2), nn.MaxPool2d(2)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.stem(x_BCHW)
        for block in self.blocks if self.looped else ():
            h_BCHW = block(h_BCHW)
        for block, pool in zip(self.beside, self.pools, strict=False):
            h_BCHW = pool(block(h_BCHW))
        return self.head(h_BCHW.mean((2, 3)))  # type: ignore[no-any-return]


def test_blocks_held_in_a_list_grow_in_number_and_others_stay() -> None:
    module = make_program(net=Lists())
    depth = GrowOnSaturation(Periodic(1), Growth(ceiling=1.0, blocks=2), until=0.9)
    trainer = fit(module, [depth], max_epochs=5)
    assert len(module.net.blocks) == 4 and len(module.net.beside) == 2
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.net.parameters()}
    assert all(block.outer.weight.any() for block in module.net.blocks)


@pytest.mark.parametrize(
    ("net", "said"), [(lambda: Lists(looped=False), "'blocks' cannot grow"), (make_network, "has no stage")]
)
def test_depth_that_no_stage_can_gain_is_refused_before_training(net: Any, said: str) -> None:
    trained: list[int] = []
    spy = Spy(on_train_batch_end=lambda *_: trained.append(1))
    depth = GrowOnSaturation(Periodic(1), Growth(blocks=1))
    with pytest.raises(StructureError, match=rf"{said}.* set its Growth's blocks to 0"):
        fit(make_program(net=net()), [depth, spy], max_epochs=2)
    assert not trained


def test_the_clock_of_a_budget_ends_at_one_with_two_optimizers_by_hand() -> None:
    clock: list[float] = []
    pruning = PruneByGates(budget=250, penalty=1e-2, begin=0.0, end=1.0)
    assert pruning.budget is not None
    spy = Spy(on_train_end=lambda *_: clock.append(pruning.budget.last_progress))
    fit(make_program(Adversary), [pruning, spy], max_epochs=11)  # of 4 batches; the last settles the gates
    assert clock == [pytest.approx(40 / 44)], "two steps a batch"
    assert pruning.report()["budget/target"] == 250


def test_frozen_layers_are_neither_pruned_nor_grown() -> None:
    module = make_program()
    module.net[0].requires_grad_(False)
    before = module.net[0].weight.clone()
    fit(module, [grow(), PruneByGates(penalty=1.0, begin=0.0)], max_epochs=8)
    assert torch.equal(module.net[0].weight, before)
    structure = structure_of(module)
    assert structure.widths["0"].size == 6
    assert not any(path == "0" for path, _, _ in iterate_gates(structure.net))


def test_a_network_that_does_not_grow_since_it_is_frozen_says_so() -> None:
    module = make_program()
    module.net[0].weight.requires_grad_(False)
    module.net[3].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"does not grow: 0\.weight, 3\.weight are not trained"):
        fit(module, [grow()], max_epochs=4)
    assert structure_of(module).widths.sizes() == {"0": 6, "3": 8}


def test_a_loss_that_holds_the_network_is_no_second_one() -> None:
    """As one that weighs its parameters does."""

    class Held(Program):
        def __init__(self) -> None:
            super().__init__()
            self.loss = nn.ModuleDict({"of": self.net})

    module = make_program(Held)
    fit(module, [grow()], max_epochs=4)
    structure = structure_of(module)
    assert structure.net is module.net and structure.widths["0"].size == 9


@pytest.mark.parametrize("monitor", ["val/acc", "val_loss"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit_val_batches": 0}, "limit_val_batches=0 leaves it out"),
        ({"val_check_interval": 0.25}, "leave trainer.val_check_interval at 1.0"),
        ({"validation": None}, "nothing is validated: give the fit validation data"),
    ],
)
def test_growth_without_its_validation_is_refused_before_training(
    options: dict[str, Any], said: str, monitor: str
) -> None:
    with pytest.raises(TrainingError, match=said) as refusal:
        fit(make_program(), [GrowOnSaturation(Plateau(2), Growth(), monitor)], **options)
    assert "\n" not in str(refusal.value)


class Logging(Program):
    """Log the epoch, as a metric of training; validation logs nothing while it is tried."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("epoch", float(self.current_epoch), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.log("val/epoch", float(self.current_epoch))


class Underscored(Program):
    """Names metrics as many programs do."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def test_a_metric_that_validation_does_not_log_is_refused_before_training() -> None:
    steps: list[int] = []
    spy = Spy(on_train_batch_start=lambda *_: steps.append(1))
    with pytest.raises(TrainingError, match=r"'val/acc', which is not logged; there are: val_loss: name one"):
        growth = GrowOnSaturation(Plateau(1), Growth(factor=1.5, ceiling=2), until=0.7)
        fit(make_program(Underscored), [growth, spy], num_sanity_val_steps=1)
    assert not steps


class Silent(Program):
    """Logs nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", [Silent, Underscored])
@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({}, [2, 4]),
        ({"num_sanity_val_steps": 1}, [2, 4]),
        ({"validation": None}, [2, 4]),
        ({"limit_val_batches": 0}, [2, 4]),
        ({"check_val_every_n_epoch": 2, "max_epochs": 8}, [4]),
    ],
)
def test_growth_by_the_clock_needs_no_metric(
    kind: type[Program], options: dict[str, Any], epochs: list[int]
) -> None:
    """It counts validations, or epochs where nothing is validated."""
    growth = grow()
    fit(make_program(kind), [growth], **options)
    grown = growth.structure.timeline
    assert sorted({row["epoch"] for row in grown}) == epochs
    assert {row["why"] for row in grown} == {"grow: by the clock"}


class Witness(Periodic):
    """Keep what is observed."""

    ignores_value = False

    def observe(self, value: float) -> bool:
        self.values = [*getattr(self, "values", []), value]
        return super().observe(value)


@pytest.mark.parametrize(
    ("monitor", "options", "expected"),
    [
        ("epoch", {}, [0, 1, 2, 3]),
        ("epoch", {"validation": None}, [0, 1, 2, 3]),
        ("val/epoch", {"num_sanity_val_steps": 1}, [0, 1, 2, 3]),
        ("val/epoch", {"check_val_every_n_epoch": 2}, [1, 3]),
    ],
)
def test_a_metric_is_observed_once_in_each_epoch_that_logs_it(
    monitor: str, options: dict[str, Any], expected: list[int]
) -> None:
    growth = GrowOnSaturation(Witness(1), Growth(factor=1.5, ceiling=2), monitor, until=1.0)
    module = make_program(Logging)
    fit(module, [growth], max_epochs=4, **options)
    assert growth.trigger.values == expected
    assert structure_of(module).timeline


class LoggingLate(Logging):
    """Log what training has come to in a hook that is called after those of callbacks."""

    def on_train_epoch_end(self) -> None:
        self.log("late", float(self.current_epoch))


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 3}, {"validation": None}])
def test_a_metric_that_the_module_logs_as_the_epoch_ends_is_observed_before_the_next(
    options: dict[str, Any], tmp_path: Path
) -> None:
    growth = GrowOnSaturation(Witness(1), Growth(factor=1.5, ceiling=2), "late", until=1.0)
    module = make_program(LoggingLate)
    fit(module, [growth], tmp_path, at_epoch_end=True, max_epochs=4, **options)
    assert growth.trigger.values == [0, 1, 2, 3]
    assert [row["epoch"] for row in structure_of(module).timeline][:1] == [1]
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["GrowOnSaturation"]
    assert kept["trigger"]["values"] == [0, 1, 2, 3]


def test_callbacks_start_anew_in_another_fit() -> None:
    """As for the next fold: growth and budget are those of the first fit, for a module like the first."""
    callbacks = [grow(), PruneByGates(budget=250, penalty=1e-2)]
    ends = []
    for _ in range(2):
        module = make_program()
        fit(module, callbacks)
        ends.append((module.state_dict(), structure_of(module).timeline, callbacks[1].report()))
    assert ends[0][2]["budget/actual"] <= 250 and ends[0][1]
    assert ends[0][1:] == ends[1][1:]
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in dict(module.named_parameters()))


def test_gates_of_an_earlier_fit_learn_in_the_next() -> None:
    module = make_program()
    fit(module, [PruneByGates(end=0.5)], max_epochs=2)
    scores = [gate.score.detach().clone() for _, _, gate in iterate_gates(module.net)]
    fit(module, [PruneByGates(penalty=1.0, begin=0.0)], max_epochs=1)
    learnt = [gate.score for _, _, gate in iterate_gates(module.net)]
    assert all(not torch.equal(*pair) for pair in zip(scores, learnt, strict=True))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (lambda: TrainJointly([0.5]), grow, "has levels, .* run GrowOnSaturation first"),
        (
            lambda: PruneDynamically(0.5),
            PruneByGates,
            "has kernel activation modules, .* run PruneByGates first",
        ),
        (lambda: PruneDynamically(0.5), lambda: TrainJointly([0.5]), "run TrainJointly first"),
        (
            lambda: PruneByGates(grain="channel"),
            lambda: PruneByMagnitude(250),
            "'channel', not 'weight': prune",
        ),
        (
            lambda: PruneByGates(grain="channel"),
            PruneByGates,
            "'channel', not 'weight': prune .* elastic.compact",
        ),
    ],
    ids=[
        "growth after levels",
        "gates after modules",
        "levels after modules",
        "magnitude after gates",
        "grains",
    ],
)
def test_what_cannot_follow_an_earlier_fit_is_refused(first: Any, second: Any, said: str) -> None:
    module = make_program()
    fit(module, [first()], max_epochs=1, limit_train_batches=1)
    with pytest.raises(TrainingError, match=said) as refusal:
        fit(module, [second()], max_epochs=1)
    assert "\n" not in str(refusal.value) and module.trainer.global_step == 0


def test_gates_of_a_layer_that_is_frozen_between_two_fits_stay_as_they_are() -> None:
    module = make_program()
    fit(module, [PruneByGates(end=0.5)], max_epochs=2)
    _, layer, gate = next(iterate_gates(module.net))
    layer.requires_grad_(False)
    before = gate.score.clone()
    fit(module, [PruneByGates(penalty=1.0, begin=0.0)], max_epochs=1)
    assert torch.equal(gate.score, before)


class Thawing(Program):
    """Train all parameters again in each epoch, as programs do that train two networks in turn."""

    def on_train_epoch_start(self) -> None:
        self.net.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=5e-2)


@pytest.mark.parametrize(
    "prune", [PruneByGates(budget=250, end=0.5), PruneByMagnitude(budget=250, begin=0.1, end=0.5)]
)
def test_a_program_that_unfreezes_its_network_keeps_the_budget(prune: L.Callback) -> None:
    scores: list[list[torch.Tensor]] = []

    def keep(trainer: L.Trainer, module: L.LightningModule) -> None:
        gates = iterate_gates(structure_of(module).net)
        if trainer.current_epoch >= 3:
            scores.append([gate.score.detach().clone() for _, _, gate in gates])

    # What is averaged is what a run keeps.
    fit(make_program(Thawing), [prune, AverageWeights(decay=0.999), Spy(on_train_epoch_end=keep)])
    assert prune.report()["budget/actual"] == 250  # type: ignore[attr-defined]
    for later in scores[1:]:
        for score, before in zip(later, scores[0], strict=True):
            assert torch.equal(score, before)


class Bare(nn.Module):
    """A network whose weights are in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.weight = nn.ParameterDict({"weight": torch.rand(6, 1)}), nn.Parameter(torch.rand(4, 6))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return F.linear(F.relu(F.linear(x_BCHW.mean((2, 3)), self.one["weight"])), self.weight)


def test_weights_in_no_layer_are_not_pruned_by_macs() -> None:
    with pytest.raises(OptionError, match=r"no layer .* set by=params"):
        fit(make_program(net=Bare()), [PruneByGates(by="macs")])


def test_what_cannot_follow_growth_is_refused_before_training() -> None:
    with pytest.raises(TrainingError, match=r"StochasticWeightAveraging cannot follow .* leave one"):
        fit(make_program(), [grow(), StochasticWeightAveraging(1e-3)])


def test_a_module_of_several_networks_is_asked_for_one_by_name() -> None:
    class Two(Program):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.Sequential(*make_network()[:8]), nn.Linear(32, 4)

        def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
            logits_BK: torch.Tensor = self.head(self.net(x_BCHW))
            return logits_BK

    with pytest.raises(TrainingError, match=r"2 children with parameters \(net, head\).*FollowNetwork"):
        fit(make_program(Two), [grow()])
    module = make_program(Two)
    fit(module, [FollowNetwork("net"), grow()])
    assert structure_of(module).widths.sizes() == {"0": 12}, "what the head reads stays as it is"
    with pytest.raises(TrainingError, match="no 'body': name its network, one of net, head"):
        fit(make_program(Two), [FollowNetwork("body"), grow()])


def test_the_input_of_a_network_inside_a_module_is_what_reaches_it() -> None:
    class Inner(Program):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.net = nn.Conv2d(1, 5, 2, stride=2), make_network()
            self.net[0] = nn.Conv2d(5, 6, 3, padding=1)
            self.example_input_array = torch.zeros(2, 1, 8, 8)

        def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
            logits_BK: torch.Tensor = self.net(self.stem(x_BCHW))
            return logits_BK

    module = make_program(Inner)
    fit(module, [FollowNetwork("net"), grow()], max_epochs=3)
    assert tuple(structure_of(module).example.shape) == (2, 5, 4, 4)


def test_accumulated_batches_take_the_penalty_once_a_step() -> None:
    """With SGD, scores that get no other gradient move by lr · λ · Σ σ' over the steps."""

    class Deaf(Program):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 0.0 * super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def end(accumulated: int) -> torch.Tensor:
        module = make_program(Deaf)
        pruning = PruneByGates(penalty=1e-2, begin=0.0, end=1.0)
        fit(module, [pruning], max_epochs=2 * accumulated, accumulate_grad_batches=accumulated)
        return torch.cat([gate.score.flatten() for _, _, gate in iterate_gates(module.net)])

    assert (end(1) < 1).all()
    torch.testing.assert_close(end(2), end(1))


def test_scores_do_not_decay_and_the_users_optimizer_does_not_hold_them() -> None:
    module = make_program()
    trainer = fit(module, [PruneByGates(penalty=0.0)], max_epochs=1)
    scores = {id(gate.score) for _, _, gate in iterate_gates(module.net)}
    stepped = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert scores and not scores & stepped
    own = structure_of(module).own.optimizers[0]
    assert isinstance(own, torch.optim.AdamW)
    assert {group["weight_decay"] for group in own.param_groups} == {0.0}
    assert {id(p) for group in own.param_groups for p in group["params"]} == scores
    assert BATCH
