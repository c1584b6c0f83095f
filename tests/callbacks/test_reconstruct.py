"""Prune-and-grow: what is finished keeps its bits, phases train their level; resumed, measured, refused."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic.callbacks.levels
import elastic.experiments.evaluate
import elastic.experiments.train
from elastic import Growth, Periodic
from elastic.callbacks import (
    AverageWeights,
    ElasticCallback,
    GrowOnSaturation,
    PruneByGates,
    PruneByMagnitude,
    PruneDynamically,
    Reconstruct,
    TrainJointly,
)
from elastic.errors import ElasticError, StructureError, TrainingError
from elastic.experiments.evaluate import evaluate
from elastic.experiments.tools.summary import measure_network
from elastic.experiments.train import build, train
from elastic.files.network import Network
from elastic.levels.freezing import Phase
from elastic.levels.importance import score_channels
from elastic.levels.nested import Levels
from elastic.measure import counts
from elastic.pruning import gates
from elastic.training.module import ElasticClassifier
from elastic.widths.discovery import discover
from tests import programs
from tests.elastic.levels.nets import extracted, inside
from tests.fitted import EXACT, Run, Spy, batch, command, prepare
from tests.programs import Program
from tests.resuming import assert_same_run, kill
from tests.runs import TINY, configure

SCHEDULE = ("schedule=reconstruct", "callbacks.reconstruct.fractions=[0.5,0.75]", "trainer.max_epochs=10")
RECONSTRUCTING = (*EXACT, *SCHEDULE, "data.batch_size=400", "optimizer.lr=2e-2")
PHASES = [
    Phase(2, False, range(0, 4)),
    *(Phase(1, False, range(4, 6)), Phase(0, False, range(6, 7))),
    *(Phase(1, True, range(7, 8)), Phase(2, True, range(8, 10))),
]
MODELS: dict[str, tuple[str, ...]] = {
    "convnet": ("optimizer.weight_decay=0.5",),
    "resnet": (
        *("model=resnet20", "model._target_=elastic.models.resnet.resnet", "+model.blocks=1"),
        *("model.width=4", "optimizer=sgd", "optimizer.weight_decay=0.01"),
    ),
}
Capture = pytest.CaptureFixture[str]


def snapshot(levels: Levels) -> list[dict[str, Tensor]]:
    """All that each level holds, its statistics included."""
    return [{n: t.detach().clone() for n, t in level.state_dict().items()} for level in levels]


@dataclass
class Witness:
    """A run, and what its levels held at the start and the end of each epoch."""

    run: Run
    starts: list[list[dict[str, Tensor]]] = field(default_factory=list)
    ends: list[list[dict[str, Tensor]]] = field(default_factory=list)
    first: list[list[Tensor]] = field(default_factory=list)  # what its levels say as an epoch starts
    last: list[list[Tensor]] = field(default_factory=list)  # and as it ends
    rates: list[list[float]] = field(default_factory=list)  # of each step, by epoch
    known: list[int] = field(default_factory=list)  # states of the optimizer before an epoch's first step
    scores: list[dict[str, Tensor]] = field(default_factory=list)  # of the level above the one trained
    accuracy: list[tuple[float, float]] = field(default_factory=list)  # logged, by hand
    samples: int = 0
    right: list[Tensor] = field(default_factory=list)

    @property
    def levels(self) -> Levels:
        assert self.run.module.structure.levels is not None
        return self.run.module.structure.levels

    def spies(self) -> Spy:
        return Spy(
            on_train_epoch_start=self._start,
            on_train_batch_start=self._step,
            on_train_epoch_end=self._end,
            on_validation_batch_end=self._validate,
            on_validation_epoch_end=self._validated,
        )

    def _start(self, trainer: Any, module: Any) -> None:
        phase = phase_of(trainer.current_epoch)
        self.starts.append(snapshot(self.levels))
        self.rates.append([])
        above = self.levels[min(phase.level + 1, len(self.levels) - 1)]
        self.scores.append(score_channels(above, discover(above, module.structure.example)))

        self.first.append(self._says(trainer))

    def _end(self, trainer: Any, module: Any) -> None:
        self.ends.append(snapshot(self.levels))
        self.last.append(self._says(trainer))

    @torch.no_grad()
    def _says(self, trainer: Any) -> list[Tensor]:
        x_BCHW, _ = batch(trainer.datamodule)
        return [extracted(self.levels, k).eval()(x_BCHW) for k in range(len(self.levels))]

    def _step(self, trainer: Any, module: Any, given: Any, index: int) -> None:
        if index == 0:
            self.known.append(len(trainer.optimizers[0].state))
        self.rates[-1].append(trainer.optimizers[0].param_groups[0]["lr"])
        self.samples += len(given[0]) if trainer.current_epoch == 0 else 0

    def _validate(self, trainer: Any, module: Any, out: Any, given: Any, *_: Any) -> None:
        x_BCHW, y_B = given
        if not trainer.sanity_checking:
            own = extracted(self.levels, phase_of(trainer.current_epoch).level).eval()
            self.right.append(own(x_BCHW).argmax(1) == y_B)

    def _validated(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            by_hand = torch.cat(self.right).float().mean().item()
            self.right.clear()
            self.accuracy.append((module.metrics["val"]["acc"].compute().item(), by_hand))


def phase_of(epoch: int) -> Phase:
    return next(phase for phase in PHASES if epoch in phase.epochs)


@pytest.fixture(scope="module", params=["convnet", pytest.param("resnet", marks=pytest.mark.slow)])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Witness:
    """One run a model; each test looks at another side of it."""
    witness: Any = Witness(None)  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp(request.param)
    options = (*RECONSTRUCTING, *MODELS[request.param])
    witness.run = prepare(folder, *options, after=(witness.spies(),))
    witness.run.fit()
    return witness


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in one.items())


# --- what a run does ---------------------------------------------------------------------------------------


def test_its_phases_are_these(seen: Witness) -> None:
    assert seen.run.callbacks["reconstruct"].phases == PHASES and len(seen.ends) == 10


def test_a_level_that_is_finished_keeps_every_bit_to_the_end(seen: Witness) -> None:
    """Weights, norms, running statistics and their counts, in all epochs that follow, and in the result."""
    final = snapshot(seen.levels)
    for k, phase in enumerate([PHASES[2], *PHASES[3:]]):
        assert phase.level == k
        finished = seen.ends[phase.epochs[-1]][k]
        for later in (*seen.starts[phase.epochs[-1] + 1 :], *seen.ends[phase.epochs[-1] + 1 :], final):
            assert equal(later[k], finished), k
    inside(seen.levels)


def test_each_phase_trains_its_level(seen: Witness) -> None:
    """All its convolutions and its norms; of the levels above it, the norms stay as they were."""
    for phase in PHASES:
        for epoch in phase.epochs:
            before, after = seen.starts[epoch], seen.ends[epoch]
            k = phase.level
            for name, tensor in before[k].items():
                if tensor.dim() == 4 or "running" in name or "num_batches" in name:
                    assert not torch.equal(tensor, after[k][name]), (epoch, name)
            own = {n for n, _ in seen.levels.norms[0].state_dict().items()}
            names = {n.replace("/", ".") for n in own}
            for j in set(range(3)) - {k}:
                assert all(torch.equal(before[j][n], after[j][n]) for n in names), (epoch, j)


def outside(whole: Tensor, part: Tensor) -> Tensor:
    """The entries that a larger level has beyond a smaller one, sorted."""
    mask = torch.ones(whole.shape, dtype=torch.bool)
    mask[tuple(map(slice, part.shape))] = False
    return whole[mask].sort().values


def test_channels_are_grown_back_from_the_values_that_they_were_pruned_with(seen: Witness) -> None:
    for pruned, grown in ((PHASES[2], PHASES[3]), (PHASES[1], PHASES[4])):
        k = grown.level
        then, now = seen.starts[pruned.epochs[0]], seen.starts[grown.epochs[0]]
        moved = 0
        for name, tensor in then[k].items():
            if tensor.dim() > 1:
                at_first, again = outside(tensor, then[k - 1][name]), outside(now[k][name], now[k - 1][name])
                assert torch.equal(at_first, again), name
                moved += len(again)
        assert moved > 100


def test_the_best_channels_come_first(seen: Witness) -> None:
    """As pruning begins, the level above has its channels from the best to the worst."""
    for phase in PHASES[1:3]:
        for name, scores in seen.scores[phase.epochs[0]].items():
            assert len(scores) == seen.levels.sizes[phase.level + 1][name]
            assert (scores[:-1] >= scores[1:] * (1 - 1e-6)).all(), name


def test_what_is_pruned_starts_with_the_norms_of_what_it_is_pruned_from(seen: Witness) -> None:
    names = [name.replace("/", ".") for name in seen.levels.norms[0].state_dict()]
    for phase in PHASES[1:3]:
        small, large = seen.starts[phase.epochs[0]][phase.level : phase.level + 2]
        for name in names:
            assert torch.equal(small[name], large[name][tuple(map(slice, small[name].shape))]), name


def test_to_order_channels_changes_the_function_of_no_level_that_has_them_all(seen: Witness) -> None:
    for before, after in pairwise(PHASES):
        if not after.grown:
            then, now = seen.last[before.epochs[-1]], seen.first[after.epochs[0]]
            for k in range(after.level + 1, len(seen.levels)):
                torch.testing.assert_close(now[k], then[k], rtol=1e-4, atol=1e-4 * float(then[k].abs().max()))


def test_to_begin_to_grow_changes_no_bit(seen: Witness) -> None:
    for before, after in pairwise(PHASES):
        if after.grown:
            for then, now in zip(seen.ends[before.epochs[-1]], seen.starts[after.epochs[0]], strict=True):
                assert equal(then, now)


def test_each_phase_has_an_optimizer_and_a_schedule_of_its_own(seen: Witness) -> None:
    """OneCycleLR as torch makes it for as many steps as the phase has."""
    steps = len(seen.rates[0])
    made = partial(torch.optim.lr_scheduler.OneCycleLR, pct_start=0.2)
    for phase in PHASES:
        rates = [rate for epoch in phase.epochs for rate in seen.rates[epoch]]
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0, momentum=0.9)
        scheduler = made(optimizer, seen.run.module.make_scheduler.keywords["max_lr"], len(rates))  # type: ignore
        expected = []
        for _ in rates:
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx(expected) and len(rates) == steps * len(phase.epochs)
        assert [seen.known[epoch] > 0 for epoch in phase.epochs] == [False] + [True] * (len(phase.epochs) - 1)


def test_the_level_that_is_trained_is_validated(seen: Witness) -> None:
    logged, by_hand = zip(*seen.accuracy, strict=True)
    assert logged == pytest.approx(by_hand) and len(logged) == 10
    history = [row["val/acc"] for row in seen.run.callbacks["census"].history]
    assert history == pytest.approx(by_hand)


def test_the_timeline_replayed_goes_down_to_the_core_and_up_to_the_network(seen: Witness) -> None:
    """Through every level, at the start of its phase."""
    text = (seen.run.folder / "timeline.jsonl").read_text()
    events = [json.loads(line) for line in text.splitlines()]
    assert events == seen.run.module.structure.timeline
    steps = len(seen.rates[0])
    sizes = dict(seen.run.module.structure.start_sizes)
    assert sizes == seen.levels.sizes[-1]
    for epoch in range(10):
        for event in (e for e in events if e["epoch"] == epoch):
            assert list(event) == ["epoch", "step", "why", "width", "before", "after"]
            assert sizes[event["width"]] == event["before"] != event["after"]
            assert event["step"] == steps * epoch
            phase = phase_of(epoch)
            assert event["why"] == f"{'grow' if phase.grown else 'prune'}: level {phase.level}"
            sizes[event["width"]] = event["after"]
        assert sizes == seen.levels.sizes[phase_of(epoch).level]
    assert {e["epoch"] for e in events} == {phase.epochs[0] for phase in PHASES[1:]}


def test_the_census_counts_the_level_that_is_trained(seen: Witness) -> None:
    module = seen.run.module
    macs = {k: counts.count_macs(extracted(seen.levels, k), module.structure.example) for k in range(3)}
    expected = sum(3 * seen.samples * len(phase.epochs) * macs[phase.level] for phase in PHASES)
    assert seen.run.callbacks["census"].macs_training == expected
    assert {row["macs"] for row in seen.run.callbacks["census"].history} == {macs[2]}


def test_importance_may_come_from_gradients(tmp_path: Path) -> None:
    """The channels of each width are in the order of a score taken by hand from the same images."""
    checked: list[int] = []
    run: Any = None

    def look(trainer: Any, module: Any) -> None:
        phase = phase_of(trainer.current_epoch)
        if phase in PHASES[1:3] and trainer.current_epoch == phase.epochs[0]:
            level = module.structure.levels[phase.level + 1]
            given = [trainer.datamodule.sample(256, module.seed)]
            for scores in score_channels(
                level, discover(level, module.structure.example), "taylor", given
            ).values():
                assert (scores[:-1] >= scores[1:] * (1 - 1e-3) - 1e-7).all()
            checked.append(phase.level)

    options = (*RECONSTRUCTING, "callbacks.reconstruct.importance=taylor")
    run = prepare(tmp_path, *options, after=(Spy(on_train_epoch_start=look),))
    run.fit()
    assert checked == [1, 0]


# --- runs that are killed ----------------------------------------------------------------------------------

RESUMED = (
    *TINY,
    "experiment=smoke",
    *SCHEDULE,
    "data.batch_size=400",
    "trainer.max_epochs=12",
    "callbacks.reconstruct.dense=0.34",
)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            ("trainer.precision=32-true", "optimizer=sgd", "callbacks.reconstruct.importance=taylor"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (
                "trainer.precision=bf16-mixed",
                "callbacks.reconstruct.by=macs",
                "callbacks.reconstruct.fractions=[9e3,18e3]",
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sgd", "adamw"],
)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Killed inside a phase that prunes, as one that grows begins, and inside that one."""
    given = (*RESUMED, *options)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(configure(whole, *given), whole)
    for epoch, index in ((5, 1), (8, 0), (9, 1)):
        kill(configure(broken, *given), broken, monkeypatch, epoch, index)
    train(configure(broken, *given), broken)
    events = [json.loads(line) for line in (whole / "timeline.jsonl").read_text().splitlines()]
    assert {e["epoch"] for e in events} == {4, 6, 8, 10}
    assert_same_run(whole, broken)
    train(configure(broken, *given), broken)  # finished: there is nothing left to train
    assert_same_run(whole, broken)


def fake_ms(scale: float) -> Callable[..., float]:
    return lambda net, example: scale * counts.count_macs(net, example) / 28_304


@pytest.mark.slow
def test_a_run_that_was_cut_by_latency_goes_on_with_the_sizes_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the machine says when it goes on: slower, faster, too slow and too fast for the budgets."""
    given = (*RESUMED, "callbacks.reconstruct.by=latency_ms", "callbacks.reconstruct.fractions=[0.3,0.6]")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    monkeypatch.setattr(elastic.callbacks.levels, "measure_latency_ms", fake_ms(1.0))
    train(configure(whole, *given), whole)
    for scale, epoch, index in ((1.0, 3, 1), (1.3, 5, 1), (100.0, 9, 1)):
        monkeypatch.setattr(elastic.callbacks.levels, "measure_latency_ms", fake_ms(scale))
        kill(configure(broken, *given), broken, monkeypatch, epoch, index)
    monkeypatch.setattr(elastic.callbacks.levels, "measure_latency_ms", fake_ms(1e-3))
    train(configure(broken, *given), broken)
    assert_same_run(whole, broken)
    net = build(configure(tmp_path / "third", *given))[0].net
    network = Network.load(whole / "model.safetensors", net, EXAMPLE)
    for level, most in zip(network.nets, (0.3, 0.6, 1.0), strict=True):
        assert fake_ms(1.0)(level, EXAMPLE) <= most


EXAMPLE = torch.zeros(1, 1, 8, 8)
FINISHED = (*RECONSTRUCTING, "seed=3")

# --- runs that are finished --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(configure(folder, *FINISHED), folder)
    return folder


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def test_the_summary_has_a_row_a_level(finished: Path) -> None:
    """Counted and tested again on networks that are cut out of the saved file."""
    found = summary(finished)
    module, data = build(configure(finished / "x", *FINISHED))
    network = Network.load(finished / "model.safetensors", module.net, module.structure.example)
    levels = network.levels
    assert levels is not None
    data.prepare_data()
    data.setup("test")
    assert [row["level"] for row in found["levels"]] == [0, 1, 2] and found["schedule"] == "reconstruct"
    for k, row in enumerate(found["levels"]):
        own = extracted(levels, k).eval()
        assert row["macs"] == counts.count_macs(own, module.structure.example)
        assert row["params"] == sum(int(p.count_nonzero()) for p in own.parameters())
        assert row["test/acc"] == pytest.approx(accuracy_by_hand(own, data))
    last = found["levels"][-1]
    assert {name: found[name] for name in ("params", "macs", "test/acc")} == {
        name: last[name] for name in ("params", "macs", "test/acc")
    }
    assert [row["params"] for row in found["levels"]] == sorted(row["params"] for row in found["levels"])
    assert measure_network(network, data, module.task)["levels"] == found["levels"]
    inside(levels)  # to measure is not to change


@torch.no_grad()
def accuracy_by_hand(net: nn.Module, data: Any) -> float:
    right = []
    for given in data.test_dataloader():
        x_BCHW, y_B = data.on_after_batch_transfer(given, 0)
        right.append(net(x_BCHW).argmax(1) == y_B)
    return torch.cat(right).float().mean().item()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_is_measured_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, level: int
) -> None:
    given = (f"run={finished}", f"level={level}")
    code, out, err = command(elastic.experiments.evaluate.main, monkeypatch, capsys, *given)
    again = json.loads(out.strip().splitlines()[-1])
    assert (code, err) == (0, "")
    row = summary(finished)["levels"][level]
    assert {name: again[name] for name in row if name != "level"} == {
        name: row[name] for name in row if name != "level"
    }


def test_all_levels_are_measured_again_whatever_the_summary_says(finished: Path, tmp_path: Path) -> None:
    assert evaluate(finished) == summary(finished)
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    measured = ("test/acc", "params", "params_dense", "macs", "macs_dynamic")
    (tmp_path / "summary.json").write_text(
        json.dumps(summary(finished) | dict.fromkeys(measured, -1) | {"levels": []})
    )
    assert evaluate(tmp_path) == summary(finished)


def refused(err: str, code: int, *named: str) -> None:
    """One line says what is wrong, after Hydra's own if there is one."""
    *others, line = err.strip().splitlines()
    assert code == 1 and line.startswith("error: ") and "Traceback" not in err, err
    assert not others or (len(others) == 1 and others[0].startswith("Error executing job")), err
    assert all(part in line for part in named), err


@pytest.mark.parametrize("level", [-1, 3, 17])
def test_a_level_that_does_not_exist_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, level: int
) -> None:
    given = (f"run={finished}", f"level={level}")
    code, out, err = command(elastic.experiments.evaluate.main, monkeypatch, capsys, *given)
    refused(err, code, f"no level {level}", "0 … 2")
    assert out == ""


@pytest.mark.parametrize("level", ["x", "1.5", "[0]"])
def test_a_level_that_is_no_number_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, level: str
) -> None:
    given = (f"run={finished}", f"level={level}")
    code, _, err = command(elastic.experiments.evaluate.main, monkeypatch, capsys, *given)
    refused(err, code, f"level={level} is no whole number")


def test_a_network_without_levels_is_its_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    train(configure(tmp_path, *EXACT, "schedule=static"), tmp_path)
    found = evaluate(tmp_path, 0)
    assert found == evaluate(tmp_path), "level 0 is the network itself"
    given = (f"run={tmp_path}", "level=1")
    code, out, err = command(elastic.experiments.evaluate.main, monkeypatch, capsys, *given)
    refused(err, code, "no level 1", "level 0 alone")
    assert out == ""


@pytest.mark.slow
def test_a_run_starts_from_one_that_grew_and_was_pruned(tmp_path: Path) -> None:
    """The levels' network is what that run saved; it is then pruned without a dense phase."""
    first, second = tmp_path / "first", tmp_path / "second"
    growing = (
        *(*TINY, "experiment=smoke", "trainer.max_epochs=8", "trigger=periodic", "trigger.every=2"),
        *("callbacks.gates.begin=0.0", "callbacks.gates.budget=1500", "callbacks.gates.grace=0"),
        *("optimizer.lr=3e-2", "callbacks.growth.until=0.5", "data.batch_size=64"),
    )
    before = train(configure(first, *growing), first)
    assert before["params"] < before["params_dense"], "pruned"
    held: list[Tensor] = []

    def look(trainer: Any, module: Any) -> None:
        x_BCHW, _ = batch(trainer.datamodule)
        with torch.no_grad():
            held.append(extracted(module.structure.levels, 2).eval()(x_BCHW))

    given = (*RECONSTRUCTING, f"init={first}", "callbacks.reconstruct.dense=0")
    run = prepare(second, *given, before=(Spy(on_fit_start=look),))
    fresh, _ = build(configure(tmp_path / "x", *RECONSTRUCTING))
    assert run.module.structure.start_sizes != fresh.structure.start_sizes, "it has grown"
    net = build(configure(tmp_path / "y", *growing))[0].net
    plain = Network.load(first / "model.safetensors", net, EXAMPLE).plain()
    run.fit()
    with torch.no_grad():
        assert torch.allclose(held[0], plain(batch(run.data)[0]), atol=1e-5)
    assert [phase.level for phase in run.callbacks["reconstruct"].phases] == [1, 0, 1, 2]
    assert {
        event["epoch"] for event in run.module.structure.timeline if event["why"].startswith("prune")
    } == {0, 2}

    third = tmp_path / "third"
    found = train(configure(third, *given), third)
    assert len(found["levels"]) == 3 and found["levels"][-1]["params"] >= before["params"]
    assert evaluate(third) == found
    (first / "model.safetensors").unlink()
    assert evaluate(third) == found, "what it started from may be gone"
    assert evaluate(third, 0)["params"] == found["levels"][0]["params"]


# --- refusals ----------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too few epochs": ({"max_epochs": 4}, "of 4 epochs none is left"),
    "no time to grow": ({"dense": 0.7}, "none is left to grow level 1"),
    "a dense phase of less than none": ({"dense": -0.1}, r"dense=-0\.1"),
    "levels that descend": ({"fractions": [0.8, 0.5]}, "do not ascend"),
    "no levels": ({"fractions": []}, "do not ascend"),
    "an unknown measure": ({"by": "flops"}, "'flops'"),
    "an unknown importance": ({"importance": "l3"}, "'l3'"),
    "an importance that there is nothing for": ({"importance": "gate"}, "no gates"),
    "a multiple of none": ({"multiple": 0}, "multiple"),
    "a budget below the least": ({"by": "macs", "fractions": [10]}, "no level is within macs=10"),
    "levels that come out the same": ({"fractions": [0.5, 0.51]}, "levels 0 and 1 are the same"),
}


class Untrained(Program):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("trained")


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused_before_training(what: str) -> None:
    options, said = WRONG[what]
    given = {"fractions": [0.5, 0.75], **options}
    epochs = given.pop("max_epochs", 10)
    with pytest.raises(ElasticError, match=said) as caught:
        programs.fit(Untrained(), [Reconstruct(**given)], max_epochs=epochs)
    assert "\n" not in str(caught.value)


OTHERS: dict[str, Callable[[], ElasticCallback]] = {
    "growth": lambda: GrowOnSaturation(Periodic(), Growth()),
    "gates": PruneByGates,
    "magnitude": lambda: PruneByMagnitude(500),
    "ema": AverageWeights,
    "dynamic": PruneDynamically,
}


@pytest.mark.parametrize("method", [Reconstruct, TrainJointly])
@pytest.mark.parametrize("other", OTHERS)
def test_other_ways_of_changing_the_network_are_refused(
    method: type[Reconstruct | TrainJointly], other: str
) -> None:
    levels = method([0.5])
    for callbacks in ([levels, OTHERS[other]()], [OTHERS[other](), levels]):
        trainer: Any = SimpleNamespace(world_size=1, callbacks=callbacks)
        with pytest.raises(
            TrainingError, match=r"cannot be in one run.*( init=|: leave AverageWeights out$)"
        ):
            levels.check(trainer)


def tried(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, *options: str) -> tuple[int, str]:
    """Exit code and stderr; nothing may have been trained, and nothing half-finished may be left."""
    trained: list[int] = []
    with monkeypatch.context() as patch:
        step = ElasticClassifier.training_step
        patch.setattr(ElasticClassifier, "training_step", lambda *a: [trained.append(1), step(*a)][1])
        code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, f"run={folder}", *options)
    assert not trained
    left = {path.name for path in folder.rglob("*")}
    assert not left & {"summary.json", "model.safetensors", "last.ckpt"}
    return code, err


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a dense phase of less than none": (
        ("schedule=reconstruct", "callbacks.reconstruct.dense=-0.1"),
        "dense",
    ),
    "a start that is not there": (("schedule=reconstruct", "init=/nonexistent"), "/nonexistent"),
    "both ways at once": (("schedule=[joint,reconstruct]",), "choose one of the schedules"),
    "another change": (("schedule=[gates,reconstruct]",), "init="),
    "two processes": (
        ("schedule=joint", "trainer.devices=2", "trainer.strategy=ddp"),
        "set trainer.devices=1",
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("what", REFUSED)
def test_a_run_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, what: str
) -> None:
    options, said = REFUSED[what]
    given = (*TINY, "experiment=smoke", "trainer.max_epochs=12", *options)
    code, err = tried(tmp_path, monkeypatch, capsys, *given)
    refused(err, code, said)


@pytest.mark.parametrize("method", [Reconstruct, TrainJointly])
def test_several_processes_are_refused_however_they_came(
    method: type[Reconstruct | TrainJointly], tmp_path: Path
) -> None:
    module, _ = build(configure(tmp_path, *RECONSTRUCTING))
    levels = method([0.5])
    trainer: Any = SimpleNamespace(world_size=2, callbacks=[levels], max_epochs=10)
    with pytest.raises(TrainingError, match=r"trainer\.devices=1") as caught:
        levels.setup(trainer, module, "fit")
    assert "\n" not in str(caught.value) and module.structure.levels is None


def test_a_gated_network_is_refused(tmp_path: Path) -> None:
    run = prepare(tmp_path, *RECONSTRUCTING)
    gates.attach_gates(run.module.net, run.module.structure.widths, "weight")
    with pytest.raises(StructureError, match="a gated network has no levels"):
        run.fit()
