"""The sandwich rule: its gradient against networks of their own, what is logged against counts by hand."""

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.callbacks import TrainJointly
from elastic.errors import OptionError
from elastic.experiments.evaluate import evaluate
from elastic.experiments.train import build, train
from elastic.files.network import Network
from elastic.levels.importance import score_channels
from elastic.levels.nested import Levels
from elastic.measure import counts
from elastic.training.module import ElasticClassifier
from tests.elastic.levels.nets import entries, extracted, inside, norms, placed
from tests.elastic.zoo import randomised
from tests.fitted import EXACT, Run, Spy, outputs, prepare
from tests.resuming import assert_same_run, kill
from tests.runs import TINY, configure

SCHEDULE = ("schedule=joint", "callbacks.joint.fractions=[0.4,0.6,0.8]", "optimizer.lr=2e-2")
TRAINING = (*EXACT, *SCHEDULE, "data.batch_size=300", "trainer.max_epochs=3")
RESNET = (
    *("model=resnet20", "model._target_=elastic.models.resnet.resnet", "+model.blocks=1", "model.width=4"),
    *("optimizer=sgd", "optimizer.lr=2e-2"),
)


def levels_of(module: ElasticClassifier) -> Levels:
    assert module.structure.levels is not None
    return module.structure.levels


# --- a step ------------------------------------------------------------------------------------------------


def sandwich(
    levels: Levels, chosen: list[int], x_BCHW: Tensor, y_B: Tensor, smoothing: float
) -> dict[str, Any]:
    """Write the rule out over networks of their own: the task's loss, and gradients in the network's shapes.

    CE of the network with the labels, and of each chosen level with the network's softmax, which is given.
    """
    full = extracted(levels, len(levels) - 1).train()
    logits_BK = full(x_BCHW)
    loss = F.cross_entropy(logits_BK, y_B, label_smoothing=smoothing)
    loss.backward()
    soft_BK = logits_BK.softmax(1).detach()
    task = loss.detach()
    found = {name: p.grad.clone() for name, p in full.named_parameters()}  # type: ignore[union-attr]
    own = {}
    for k in chosen:
        small, numbers = extracted(levels, k).train(), entries(levels, k)
        loss = -(soft_BK * small(x_BCHW).log_softmax(1)).sum(1).mean()
        loss.backward()
        for name, p in small.named_parameters():
            if name.rpartition(".")[0] in norms(small):
                own[k, name] = p.grad
            else:
                found[name] += placed(p.grad, found[name], numbers[name])  # type: ignore[arg-type]
    return {"loss": task, "network": found, "norms": own}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("between", "model"),
    [
        *(pytest.param(n, (), marks=pytest.mark.slow, id=str(n)) for n in (0, 1)),
        pytest.param(5, (), id="5"),
        pytest.param(1, RESNET, id="resnet"),
    ],
)
def test_the_gradient_of_a_step_is_that_of_the_sandwich(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: int, model: tuple[str, ...]
) -> None:
    """In the second step, when norms and statistics have left their start."""
    seen: list[int] = []
    held: dict[str, Any] = {}
    run_level = Levels.run

    def counted(self: Levels, k: int, *inputs: Tensor, **options: Any) -> Any:
        if self[k].training or self.net.training:
            seen.append(k)
        return run_level(self, k, *inputs, **options)

    def before(trainer: Any, module: Any, given: Any, index: int) -> None:
        if index == 1 and not held:
            held.update(batch=given, levels=snapshot(module))
            seen.clear()

    def after(trainer: Any, module: Any, optimizer: Any) -> None:
        if "levels" in held and "network" not in held:
            levels = levels_of(module)
            held["network"] = {n: p.grad.clone() for n, p in module.net.named_parameters()}
            held["norms"] = {
                (k, f"{path}.{name}"): None if p.grad is None else p.grad.clone()
                for k, level in enumerate(levels[:-1])
                for path, norm in norms(level).items()
                for name, p in norm.named_parameters()
            }
            held["chosen"] = [k for k in seen if k < len(levels) - 1]

    def done(trainer: Any, module: Any, out: Any, given: Any, index: int) -> None:
        if index == 1:
            held.setdefault("loss", out["loss"])

    monkeypatch.setattr(Levels, "run", counted)
    spy = Spy(on_train_batch_start=before, on_before_optimizer_step=after, on_train_batch_end=done)
    options = (*TRAINING, *model, "label_smoothing=0.1", f"callbacks.joint.between={between}")
    exact = ("trainer.max_epochs=1", "trainer.precision=64-true", "lr_scheduler=constant")
    prepare(tmp_path, *options, *exact, before=(spy,)).fit()
    chosen = held["chosen"]
    assert chosen[0] == 0 and len(set(chosen)) == len(chosen) == 1 + min(between, 2)
    expected = sandwich(held["levels"], chosen, *held["batch"], 0.1)
    torch.testing.assert_close(held["loss"], expected["loss"])
    for name, gradient in expected["network"].items():
        torch.testing.assert_close(held["network"][name], gradient, rtol=1e-6, atol=1e-9)
    for (k, name), gradient in held["norms"].items():
        if k in chosen:
            torch.testing.assert_close(gradient, expected["norms"][k, name], rtol=1e-6, atol=1e-9)
        else:
            assert gradient is None


def snapshot(module: ElasticClassifier) -> Levels:
    """The levels as they are now, apart from those that go on training."""
    levels = levels_of(module)
    twin = Levels(copy.deepcopy(levels.net), copy.deepcopy(levels.widths), levels.sizes[:-1])
    twin.norms.load_state_dict({n: t.clone() for n, t in levels.norms.state_dict().items()})
    return twin


def test_the_levels_between_are_drawn_anew_in_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[int]] = []
    run_level = Levels.run

    def counted(self: Levels, k: int, *inputs: Tensor, **options: Any) -> Any:
        if self.net.training:
            drawn[-1].append(k)
        return run_level(self, k, *inputs, **options)

    monkeypatch.setattr(Levels, "run", counted)
    options = (*TRAINING, "data.batch_size=64", "callbacks.joint.between=1", "trainer.max_epochs=2")
    run = prepare(tmp_path, *options, after=(Spy(on_train_batch_start=lambda *_: drawn.append([])),)).fit()
    assert all(step[0] == 0 and len(step) == 2 for step in drawn), "the network itself runs in its own call"
    between = [step[1] for step in drawn]
    assert set(between) == {1, 2} and 0.25 < between.count(1) / len(between) < 0.75
    half = len(between) // 2
    assert between[:half] != between[half:], "each epoch draws its own"
    counted_macs = [counts.count_macs(level, run.module.structure.example) for level in levels_of(run.module)]
    per_step = counted_macs[3] + counted_macs[0] + (counted_macs[1] + counted_macs[2]) / 2
    samples = 64 * len(drawn)
    assert run.callbacks["census"].macs_training == pytest.approx(3 * samples * per_step, rel=1e-6)


def test_two_levels_are_trained_too(tmp_path: Path) -> None:
    run = prepare(tmp_path, *TRAINING, "callbacks.joint.fractions=[0.5]", "trainer.max_epochs=2").fit()
    assert len(levels_of(run.module)) == 2
    moments = run.module.structure.own.optimizers[0].state
    assert all(moments[p]["exp_avg"].any() for p in levels_of(run.module).norms.parameters())


# --- a run -------------------------------------------------------------------------------------------------


class Watch:
    """What a run logs of its levels, and the same by hand on networks that are cut out."""

    def __init__(self) -> None:
        self.logged: list[list[float]] = []
        self.right: dict[int, list[Tensor]] = {}
        self.by_hand: list[list[float]] = []
        self.first: list[Tensor] = []
        self.ends: list[dict[str, Tensor]] = []
        self.starts: list[dict[str, Tensor]] = []

    def spy(self) -> Spy:
        return Spy(
            on_train_start=self.started,
            on_train_batch_start=self.stepped,
            on_train_epoch_end=lambda trainer, module: self.ends.append(states(module)),
            on_validation_batch_end=self.validated,
            on_validation_end=self.ended,
        )

    def started(self, trainer: Any, module: Any) -> None:
        self.x_BCHW = trainer.datamodule.sample(64, seed=1)[0]
        self.first.append(outputs(module, self.x_BCHW))

    def stepped(self, trainer: Any, module: Any, given: Any, index: int) -> None:
        if index == 0:
            self.starts.append(states(module))
        if trainer.global_step == 0:
            levels = levels_of(module)
            self.first.append(outputs(module, self.x_BCHW))
            self.scores = score_channels(levels.net, levels.widths)
            self.inherited: list[bool] = [
                torch.equal(value, net_value[: len(value)])
                for level in levels[:-1]
                for norm, theirs in zip(*(_batch_norms(net) for net in (level, levels.net)), strict=True)
                for value, net_value in zip(
                    (*norm.parameters(), norm.running_mean, norm.running_var),
                    (*theirs.parameters(), theirs.running_mean, theirs.running_var),
                    strict=True,
                )
            ]

    def validated(self, trainer: Any, module: Any, out: Any, given: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            for k in range(len(levels_of(module))):
                own: nn.Module = extracted(levels_of(module), k).eval()
                self.right.setdefault(k, []).append(own(given[0]).argmax(1) == given[1])

    def ended(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            names = [*(f"val/acc/level{k}" for k in range(len(levels_of(module)) - 1)), "val/acc"]
            self.logged.append([float(trainer.callback_metrics[name]) for name in names])
            self.by_hand.append([torch.cat(r).float().mean().item() for r in self.right.values()])
            self.right.clear()


def _batch_norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def states(module: ElasticClassifier) -> dict[str, Tensor]:
    kept = ("net.", "structure.level_norms.")
    return {n: t.clone() for n, t in module.state_dict().items() if n.startswith(kept)}


@pytest.fixture(
    scope="module", params=[(), pytest.param(RESNET, marks=pytest.mark.slow)], ids=["convnet", "resnet"]
)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Watch]:
    watch = Watch()
    options = (*TRAINING, *request.param, "data.batch_size=100")
    run = prepare(tmp_path_factory.mktemp("joint"), *options, after=(watch.spy(),))
    randomised(run.module.net)  # as if trained: no norm is neutral
    return run.fit(), watch


def test_the_accuracy_of_each_level_is_logged(seen: tuple[Run, Watch]) -> None:
    """Over validation batches of unequal sizes, on the levels as networks of their own."""
    run, watch = seen
    assert len(run.data.val_set) % 100 != 0 and len(watch.logged) == 3  # type: ignore[arg-type]
    for logged, by_hand in zip(watch.logged, watch.by_hand, strict=True):
        assert logged == pytest.approx(by_hand, abs=1e-6)
    history = run.callbacks["census"].history[-1]
    assert [history[f"val/acc/level{k}"] for k in range(3)] == pytest.approx(watch.by_hand[-1][:-1])


def test_the_best_channels_come_first_and_the_function_stays(seen: tuple[Run, Watch]) -> None:
    _, watch = seen
    before, after = watch.first
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    for name, scores in watch.scores.items():
        assert (scores[:-1] >= scores[1:] * (1 - 1e-6)).all(), name
    assert all(watch.inherited) and watch.inherited


def test_channels_are_put_in_order_once(seen: tuple[Run, Watch]) -> None:
    """No epoch after the first begins with a change of any bit, norms of the levels included."""
    _, watch = seen
    for end, start in zip(watch.ends, watch.starts[1:], strict=False):
        assert end.keys() == start.keys() and any(name.startswith("structure.level_norms") for name in end)
        assert all(torch.equal(value, start[name]) for name, value in end.items())
    assert len(watch.ends) == len(watch.starts) == 3


def test_levels_end_in_the_networks_storage_each_with_norms_of_its_own(seen: tuple[Run, Watch]) -> None:
    run, _ = seen
    levels = levels_of(run.module)
    inside(levels)
    means: Any = [list(norms(level).values())[-1].running_mean for level in levels]
    assert all(not torch.equal(a, b[: len(a)]) for a, b in pairwise(means))
    assert run.module.structure.timeline == [] and run.module.structure.level == len(levels) - 1


@pytest.mark.slow
def test_all_levels_learn(tmp_path: Path) -> None:
    options = (*TRAINING, "data.batch_size=100", "trainer.max_epochs=6", "model.channels=[12,12,16,16]")
    found = train(configure(tmp_path, *options), tmp_path)
    accuracies = [row["test/acc"] for row in found["levels"]]
    assert min(accuracies) > 0.7 and found["schedule"] == "joint"
    assert evaluate(tmp_path) == found
    module, _ = build(configure(tmp_path / "again", *options))
    levels = Network.load(tmp_path / "model.safetensors", module.net, module.structure.example).nets
    assert [counts.count_macs(level, module.structure.example) for level in levels] == [
        row["macs"] for row in found["levels"]
    ]


@pytest.mark.parametrize(
    "options",
    [
        ("trainer.precision=32-true", "optimizer=sgd", "callbacks.joint.importance=taylor"),
        pytest.param(
            (
                "trainer.precision=bf16-mixed",
                "callbacks.joint.by=macs",
                "callbacks.joint.fractions=[9e3,14e3,20e3]",
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sgd", "adamw"],
)
@pytest.mark.slow
def test_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    given = (*TINY, "experiment=smoke", *SCHEDULE, "data.batch_size=300", "trainer.max_epochs=5", *options)
    given = (*given, "callbacks.joint.between=1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    one = train(configure(whole, *given), whole)
    for epoch, index in ((1, 2), (3, 0)):
        kill(configure(broken, *given), broken, monkeypatch, epoch, index)
    two = train(configure(broken, *given), broken)
    assert_same_run(whole, broken)
    assert train(configure(broken, *given), broken)["levels"] == two["levels"], "finished: measured again"
    assert [row["test/acc"] for row in one["levels"]] == [row["test/acc"] for row in two["levels"]]
    assert json.loads((whole / "summary.json").read_text())["levels"] == one["levels"]


def test_a_number_of_levels_that_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match="between") as caught:
        TrainJointly([0.5], between=-1)
    assert "\n" not in str(caught.value)
