"""What users do to a training loop goes on working with elastic callbacks, or is refused in one line."""

from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from elastic import Growth, Periodic
from elastic.callbacks import (
    Census,
    Distil,
    FollowNetwork,
    GrowOnSaturation,
    PruneByGates,
    PruneByMagnitude,
    PruneDynamically,
    Reconstruct,
    TrainJointly,
)
from elastic.errors import FileError, OptionError, TrainingError
from elastic.measure import count_params
from elastic.pruning import compact
from elastic.pruning.gates import iterate_gates
from elastic.training.joining import find_structure
from elastic.training.loading import load_module
from elastic.training.module import ElasticClassifier
from elastic.training.progress import is_last_epoch, measure_epoch_progress
from elastic.training.samples import sample_batch
from elastic.training.structure import Structure
from tests.programs import (
    BATCH,
    QUIET,
    Adversary,
    Killed,
    Program,
    Spy,
    fit,
    kill_at,
    make_data,
    make_network,
)

BUDGET = 250

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def grow(**options: Any) -> GrowOnSaturation:
    return GrowOnSaturation(Periodic(2), Growth(factor=1.5, ceiling=2), until=0.5, **options)


def prune() -> PruneByGates:
    return PruneByGates(budget=BUDGET, penalty=1e-2, begin=0.0)


def make_program(kind: type[Program] = Program) -> Program:
    torch.manual_seed(3)
    return kind()


def get_structure(module: L.LightningModule) -> Structure:
    structure = find_structure(module)
    assert structure is not None
    return structure


def measure_compacted(module: L.LightningModule) -> int:
    """Count the parameters of what is left, in fp32."""
    structure = get_structure(module).float()
    return count_params(compact(structure.net.float(), structure.example))


def measure_accuracy(module: Program, net: nn.Module | None = None) -> float:
    x_NCHW, y_N = make_data(1).tensors
    with torch.no_grad():
        logits_NK = (net or module.net.eval())(x_NCHW)
    return (logits_NK.argmax(1) == y_N).float().mean().item()


# --- optimizers and precision ---


class WithTensorRate(Program):
    """Learn by a rate that is a tensor, as captured graphs need it."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=torch.tensor(1e-2))


def test_a_rate_that_is_a_tensor_is_the_same_rate(tmp_path: Path) -> None:
    nets: list[dict[str, Tensor]] = []
    for kind in (Program, WithTensorRate):
        module = make_program(kind)
        torch.manual_seed(0)
        fit(module, [grow(), PruneByGates(grain="channel", penalty=1e-2, begin=0.0)])
        nets.append(module.net.state_dict())
    assert nets[0].keys() == nets[1].keys()
    for name, value in nets[0].items():
        torch.testing.assert_close(nets[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_rate_that_is_a_tensor_is_saved_and_taken_up(tmp_path: Path) -> None:
    def run(folder: Path, *more: L.Callback, checkpoint: str | None = None) -> Program:
        module = make_program(WithTensorRate)
        seeds = Spy(on_train_epoch_start=lambda t, m: torch.manual_seed(t.current_epoch))
        fit(module, [seeds, grow(), prune(), *more], folder, checkpoint)
        return module

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "parts", kill_at(14))
    again = run(tmp_path / "parts", checkpoint=str(tmp_path / "parts" / "last.ckpt"))
    for name, value in whole.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], value), name


class Plain(Program):
    """Step by plain SGD."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize(("algorithm", "most"), [("norm", 1e-3), ("value", 1e-4)])
def test_what_elastic_methods_add_is_clipped_too(algorithm: str, most: float) -> None:
    """Norms of levels move no further than the clipped gradient allows; the network does not, either."""
    module = make_program(Plain)
    starts: list[Tensor] = []
    moved: list[Tensor] = []

    def flatten(trainer: Any, module: Any) -> Tensor:
        own = get_structure(module).level_norms.parameters()
        return torch.cat([p.detach().flatten() for p in own])

    spy = Spy(
        on_train_batch_start=lambda t, m, *_: starts.append(flatten(t, m)),
        on_train_batch_end=lambda t, m, *_: moved.append(flatten(t, m) - starts[-1]),
    )
    options = {"gradient_clip_val": most, "gradient_clip_algorithm": algorithm}
    fit(module, [TrainJointly([0.5]), spy], max_epochs=1, **options)
    sizes = [step.norm() if algorithm == "norm" else step.abs().max() for step in moved]
    assert max(sizes) <= most * 1.001 and max(sizes) > 0.5 * most


def test_a_penalty_is_not_clipped() -> None:
    """The budget's controller would otherwise steer a λ that does nothing."""
    module = make_program()
    fit(module, [prune()], gradient_clip_val=1e-8, max_epochs=8)
    assert measure_compacted(module) <= BUDGET
    open_gates = [bool((gate.score > 0).all()) for _, _, gate in iterate_gates(module.net)]
    assert not all(open_gates)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_other_precisions_reach_the_budget(precision: Any) -> None:
    module = make_program()
    fit(module, [grow(), prune()], precision=precision, max_epochs=8)
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert any(event["why"].startswith("grow") for event in get_structure(module).timeline)
    assert 0.9 * BUDGET <= measure_compacted(module) <= BUDGET


@pytest.mark.sampled(2)
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
@pytest.mark.parametrize(
    "callback",
    [
        lambda: TrainJointly([0.5]),
        lambda: PruneDynamically(0.5),
        lambda: Distil(make_network().eval(), weight=0.1),
    ],
    ids=["joint", "dynamic", "distil"],
)
def test_other_precisions_train_levels_and_modules(precision: Any, callback: Callable[[], Any]) -> None:
    module = make_program()
    fit(module, [callback()], precision=precision, max_epochs=4)
    module.float()
    structure = get_structure(module)
    for k in range(len(structure.nets)):
        assert structure.run(k, make_data(1).tensors[0]).isfinite().all()
    assert measure_accuracy(module) > 0.4


# --- what bounds a run ---


def test_a_run_that_is_bounded_by_steps_grows_and_meets_its_budget() -> None:
    module = make_program()
    trainer = fit(module, [grow(), prune()], max_epochs=-1, max_steps=34)
    assert trainer.global_step == 34
    assert {event["epoch"] for event in get_structure(module).timeline if "grow" in event["why"]} == {2, 4}
    assert 0.9 * BUDGET <= measure_compacted(module) <= BUDGET


def test_processes_whose_clocks_differ_are_equally_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would change their networks in different epochs, and wait for each other for ever."""
    elapsed, sent = iter((3.0, 5.0)), list[float]()
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: next(elapsed))
    trainer = fit(Program(), [], max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.callbacks.append(Timer({"seconds": 10}))  # type: ignore[attr-defined]
    trainer.fit_loop.max_epochs = -1

    def broadcast(value: float) -> float:
        sent.append(value)
        return sent[0]

    monkeypatch.setattr(trainer.strategy, "broadcast", broadcast)
    assert measure_epoch_progress(trainer) == measure_epoch_progress(trainer) == 0.3


def test_a_run_that_is_bounded_by_time_grows_and_meets_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second a batch, by a clock of the test's own."""
    batches: list[int] = []
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: float(len(batches)))
    module = make_program()
    spy = Spy(on_train_batch_end=lambda *_: batches.append(1))
    fit(module, [spy, grow(), prune()], max_epochs=-1, max_time={"seconds": 40})
    assert len(batches) == 40
    assert {event["epoch"] for event in get_structure(module).timeline if "grow" in event["why"]} == {2, 4}
    assert 0.9 * BUDGET <= measure_compacted(module) <= BUDGET


def test_phases_need_epochs() -> None:
    with pytest.raises(OptionError, match=r"part of the run's epochs: set trainer.max_epochs") as refusal:
        fit(make_program(), [Reconstruct([0.5])], max_epochs=-1, max_steps=40)
    assert "\n" not in str(refusal.value)


def test_phases_can_be_tried_in_one_batch() -> None:
    assert fit(make_program(), [Reconstruct([0.5])], fast_dev_run=True).global_step == 1


def test_a_run_that_is_stopped_early_says_what_became_of_its_budget() -> None:
    module, pruning = make_program(), prune()
    trainer = fit(module, [grow(), pruning, EarlyStopping("val/acc", mode="max", patience=1)], max_epochs=40)
    assert trainer.current_epoch < 30
    report = pruning.report()
    assert report["budget/actual"] > BUDGET == report["budget/target"] and report["budget/reason"]


def test_a_run_goes_on_for_more_epochs_than_it_was_started_with(tmp_path: Path) -> None:
    module, again = make_program(), make_program()
    fit(module, [grow(), PruneByGates(penalty=1e-2)], tmp_path, max_epochs=5)
    last = str(tmp_path / "last.ckpt")
    trainer = fit(again, [grow(), PruneByGates(penalty=1e-2)], tmp_path, last, max_epochs=9)
    assert trainer.current_epoch == 9
    first, second = get_structure(module).timeline, get_structure(again).timeline
    assert second[: len(first)] == first and {event["epoch"] for event in first} == {2}


# --- data ---


class Stream(IterableDataset[Any]):
    """Give images without saying how many there are."""

    def __iter__(self) -> Iterator[Any]:
        yield from make_data()


class Endless(Stream):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [grow(), PruneByGates(penalty=1e-2, begin=0.0)],
        lambda: [prune()],
        lambda: [PruneDynamically(gain=0.5)],
        lambda: [TrainJointly([0.5], importance="taylor")],
    ],
    ids=["growth+gates", "budget", "dynamic", "joint"],
)
def test_data_without_a_length(callbacks: Callable[[], Sequence[L.Callback]]) -> None:
    module, chosen = make_program(), callbacks()
    fit(module, chosen, loader=DataLoader(Stream(), BATCH))
    for callback in chosen:
        if isinstance(callback, PruneByGates) and callback.budget is not None:
            assert measure_compacted(module) <= BUDGET


class Fetching(Program):
    """Take its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        (x_BCHW, y_B), *_ = next(dataloader_iter)
        return nn.functional.cross_entropy(self(x_BCHW), y_B)


@pytest.mark.filterwarnings(
    "ignore:Found `dataloader_iter` argument", "ignore:You are using the `dataloader_iter`"
)
def test_a_step_that_takes_its_batches_itself_is_the_same_step(tmp_path: Path) -> None:
    ends = []
    for kind in (Fetching, Program):
        module, census = make_program(kind), Census(str(tmp_path))
        fit(module, [census, grow(), PruneByGates(penalty=1e-2, begin=0.0)], max_epochs=3)
        ends.append((census.macs_training, module.net.state_dict()))
    assert ends[0][0] == ends[1][0] > 0
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


@pytest.mark.parametrize("method", [prune, lambda: PruneByMagnitude(BUDGET, begin=0.0)])
def test_steps_bound_data_that_never_ends(method: Callable[[], PruneByGates | PruneByMagnitude]) -> None:
    """Gates learn until their part of the run has passed, and are fitted then, within the one epoch."""
    pruning, sizes = method(), []
    spy = Spy(on_train_batch_end=lambda *_: sizes.append(pruning.measure_size()))
    module = make_program()
    trainer = fit(module, [pruning, spy], loader=DataLoader(Endless(), BATCH), max_epochs=-1, max_steps=40)
    assert trainer.global_step == 40 and sizes[4] > BUDGET
    assert measure_compacted(module) <= BUDGET


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_last_epoch_is_known_however_often_a_batch_steps(accumulate: int) -> None:
    last: list[bool] = []
    spy = Spy(on_train_epoch_start=lambda trainer, _: last.append(is_last_epoch(trainer)))
    module = make_program(Adversary if accumulate == 1 else Program)
    steps = 4 * (8 if accumulate == 1 else 2)  # of an epoch of 4 batches: each twice, or two in all
    options = {} if accumulate == 1 else {"accumulate_grad_batches": accumulate}
    fit(module, [spy], max_epochs=-1, max_steps=steps, **options)
    assert last == [False, False, False, True]


def test_samples_are_each_taken_once_as_the_module_sees_them() -> None:
    taken: list[Tensor] = []

    class Halved(Program):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] / 2, batch[1]]

    spy = Spy(on_train_start=lambda trainer, _: taken.append(sample_batch(trainer, 96, 0)[0]))
    fit(make_program(Halved), [spy], max_epochs=1)
    torch.testing.assert_close(taken[0], make_data().tensors[0][:96] / 2)


class Joining(Program):
    """Learn from two loaders at once, of which the network is called with the second's images first."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["second"], batch_idx) + self(batch["first"][0]).square().mean()


@pytest.mark.parametrize("join", [dict, CombinedLoader])
def test_samples_of_several_loaders_are_those_that_the_network_is_called_with(join: Any) -> None:
    taken: list[tuple[Any, Tensor]] = []
    spy = Spy(on_train_epoch_start=lambda trainer, _: taken.append(sample_batch(trainer, 96, 0)))
    loaders = {name: DataLoader(make_data(seed), BATCH) for seed, name in enumerate(("first", "second"))}
    trainer = fit(make_program(Joining), [grow(), spy], loader=join(loaders), max_epochs=2)
    assert trainer.global_step == 8, "no batch is lost"
    x_NCHW, y_N = make_data(1).tensors
    for x, y in taken:
        assert torch.equal(x, x_NCHW[:96]) and torch.equal(y, y_N[:96])


@dataclass
class Images:
    x: Tensor
    y: Tensor


def use_classes(module: Program, wrap: Callable[..., Any], read: Callable[[Any], Any]) -> DataLoader[Any]:
    """Let a module take batches of another class; return a loader of them."""
    for name in ("training_step", "validation_step"):
        step = getattr(module, name)
        setattr(module, name, lambda batch, batch_idx, step=step: step(read(batch), batch_idx))
    collate: Any = torch.utils.data.default_collate
    return DataLoader(make_data(), BATCH, collate_fn=lambda samples: wrap(*collate(samples)))


@pytest.mark.parametrize("make", [lambda: PruneByGates(budget=BUDGET), lambda: TrainJointly([0.5])])
def test_torchs_profiler_watches_each_call(make: Any, tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path, "calls", export_to_chrome=False, row_limit=-1, schedule=None)
    fit(Program(), [make()], max_epochs=2, limit_train_batches=2, profiler=profiler)
    assert "[pl][module]torch.nn.modules.conv.Conv2d: net.0" in (tmp_path / "fit-calls.txt").read_text()


@pytest.mark.parametrize(
    ("make", "wrap", "read"),
    [
        (lambda: grow(fresh="gradmax"), Images, lambda batch: (batch.x, batch.y)),
        (
            lambda: PruneDynamically(0.5, start="saliency"),
            lambda x, y: UserDict({"x": x, "y": y}),
            lambda batch: tuple(batch.values()),
        ),
    ],
    ids=["dataclass", "mapping"],
)
def test_batches_may_be_of_classes_of_ones_own(make: Any, wrap: Any, read: Any, tmp_path: Path) -> None:
    """The oracle: the same images in pairs."""
    ends = []
    for is_pair in (False, True):
        module, census = make_program(), Census(str(tmp_path))
        loader = DataLoader(make_data(), BATCH) if is_pair else use_classes(module, wrap, read)
        trainer = L.Trainer(max_epochs=3, callbacks=[census, make()], **QUIET)  # type: ignore[arg-type]
        torch.manual_seed(0)
        trainer.fit(module, loader, loader)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        ends.append((census.macs_training, logged, list(module.net.parameters())))
    assert ends[0][:2] == ends[1][:2] and ends[0][0] > 0
    assert all(torch.equal(*pair) for pair in zip(ends[0][2], ends[1][2], strict=True))


class Values(Program):
    """Fits four values an image."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/acc", 0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GrowOnSaturation(Periodic(2), Growth(ceiling=2), fresh="gradmax"),
        lambda: TrainJointly([0.5], importance="taylor", outputs="values"),
        lambda: Reconstruct([0.5], importance="taylor", dense=0.34, prune=0.33),
    ],
    ids=["gradmax", "joint", "reconstruct"],
)
def test_channels_are_judged_by_the_programs_own_loss(make: Callable[[], L.Callback]) -> None:
    x_NCHW, y_N = make_data().tensors
    loader = DataLoader(TensorDataset(x_NCHW, nn.functional.one_hot(y_N).float()), BATCH)
    seen: list[int] = []
    spy = Spy(on_train_batch_start=lambda *_: seen.append(1))
    with pytest.raises(
        TrainingError, match=r"In a program of your own, give .* FollowNetwork\('…', loss=…\)"
    ):
        fit(make_program(Values), [make(), spy], loader=loader)
    assert not seen
    module = make_program(Values)
    fit(module, [FollowNetwork("net", loss=nn.functional.mse_loss), make()], loader=loader)
    structure = get_structure(module)
    assert structure.levels is not None or structure.timeline


def test_a_budget_may_come_later(tmp_path: Path) -> None:
    fit(make_program(), [PruneByGates(penalty=1e-2)], tmp_path, max_epochs=2)
    again = make_program()
    fit(again, [prune()], tmp_path, str(tmp_path / "last.ckpt"), max_epochs=12)
    assert measure_compacted(again) <= BUDGET


def test_a_target_needs_the_length_of_an_epoch() -> None:
    own = PruneDynamically(form="target", target=0.5)
    with pytest.raises(TrainingError, match=r"no length: set trainer\.limit_train_batches"):
        fit(make_program(), [own], loader=DataLoader(Stream(), BATCH))


def test_the_classifiers_schedule_needs_it_too() -> None:
    made = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1)
    module = ElasticClassifier(make_network(), (1, 8, 8), 4, partial(torch.optim.SGD, lr=0.1), made)
    with pytest.raises(TrainingError, match=r"no length trainer\.limit_train_batches, or"):
        fit(module, [], loader=DataLoader(Stream(), BATCH))


# --- checkpoints ---


def test_the_best_network_is_tested_whatever_the_last_one_is(tmp_path: Path) -> None:
    """It has another structure: the best is that of the second epoch, and growth comes after it."""

    class Tested(Program):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("rank", 1.0 if self.current_epoch == 1 else 0.0)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            x_BCHW, y_B = batch
            self.log("test/acc", (self(x_BCHW).argmax(1) == y_B).float().mean())

    accuracies: list[float] = []
    spy = Spy(on_validation_end=lambda t, m: accuracies.append(float(t.callback_metrics["val/acc"])))
    best = ModelCheckpoint(tmp_path / "best", monitor="rank", mode="max")
    module = make_program(Tested)
    trainer = fit(module, [grow(), PruneByGates(penalty=1e-2), best, spy], tmp_path)
    assert get_structure(module).widths["0"].size > 6
    loader = DataLoader(make_data(1), BATCH)
    result = trainer.test(module, loader, ckpt_path=best.best_model_path, verbose=False)
    assert result[0]["test/acc"] == pytest.approx(accuracies[1])
    assert get_structure(module).widths["0"].size == 6


METHODS: dict[str, Callable[[], list[L.Callback]]] = {
    "grown and gated": lambda: [grow(), PruneByGates(penalty=1e-2, begin=0.0, grain="kernel")],
    "nested": lambda: [TrainJointly([0.5])],
    "with modules": lambda: [PruneDynamically([0.1, 0.5])],
}


@pytest.mark.parametrize("name", METHODS)
def test_a_module_is_loaded_without_its_callbacks(name: str, tmp_path: Path) -> None:
    module = make_program()
    fit(module, METHODS[name](), tmp_path, at_epoch_end=True)
    loaded = load_module(Program, tmp_path / "last.ckpt")
    x_NCHW, _ = make_data(1).tensors
    one, two = get_structure(module.eval()), get_structure(loaded)
    assert len(one.nets) == len(two.nets) and one.timeline == two.timeline
    with torch.no_grad():
        for k in range(len(one.nets)):
            torch.testing.assert_close(two.run(k, x_NCHW), one.run(k, x_NCHW))
        torch.testing.assert_close(loaded(x_NCHW), one.run_active(x_NCHW))


def test_a_checkpoint_without_an_elastic_network_is_named_with_its_remedy(tmp_path: Path) -> None:
    fit(make_program(), [], tmp_path, max_epochs=1)
    with pytest.raises(FileError, match=r"load it with Program\.load_from_checkpoint"):
        load_module(Program, tmp_path / "last.ckpt")
    with pytest.raises(FileError, match="cannot be read"):
        load_module(Program, tmp_path / "nothing.ckpt")


# --- tools ---


class Tunable(Program):
    """Have a rate that the finder can set."""

    lr = 1e-3

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def test_a_learning_rate_is_looked_for_and_the_run_is_as_if_it_had_been_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    callbacks = [grow(), PruneByGates(penalty=1e-2, begin=0.0)]
    options = {"accelerator": "cpu", "num_sanity_val_steps": 0, "log_every_n_steps": 1, "max_epochs": 4}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(**options, **quiet, callbacks=callbacks, enable_checkpointing=False)
    module, loaders = make_program(Tunable), [DataLoader(make_data(seed), BATCH) for seed in (0, 1)]
    torch.manual_seed(0)
    finder = Tuner(trainer).lr_find(module, *loaders, num_training=8, early_stop_threshold=None)
    assert finder is not None
    trainer.fit(module, *loaders)
    known = make_program(Tunable)
    known.lr = module.lr
    fit(known, [grow(), PruneByGates(penalty=1e-2, begin=0.0)], max_epochs=4)
    for name, value in known.net.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], value)
