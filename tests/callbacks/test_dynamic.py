"""Runs with kernel activation modules: what is trained, what is measured, what a killed run goes on with."""

import itertools
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from elastic.callbacks import LogPanels, PruneDynamically
from elastic.dynamic.loss import ActivationCost, Form
from elastic.dynamic.modules import iterate_modules
from elastic.dynamic.norms import SetNorm
from elastic.dynamic.skipping import make_skipping
from elastic.errors import ElasticError, FileError, OptionError, TrainingError
from elastic.experiments import export, latency, usage
from elastic.experiments.evaluate import evaluate
from elastic.experiments.tools.per_image import read_test_batches, run_per_image
from elastic.experiments.tools.restore import restore, restore_teacher
from elastic.experiments.train import train
from elastic.measure.counts import count_macs
from elastic.training.module import ElasticClassifier
from elastic.training.progress import measure_step_progress
from tests.fitted import EXACT, Run, Spy, prepare
from tests.resuming import assert_same_run, kill
from tests.runs import configure

SLOW = pytest.mark.slow
AT_ONCE = ("callbacks.dynamic.begin=0.0", "callbacks.dynamic.end=0.0")
SCHEDULE = ("schedule=dynamic", *AT_ONCE, "optimizer.lr=2e-2")
TRAINING = (*EXACT, *SCHEDULE, "data.batch_size=300", "trainer.max_epochs=3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two sets of modules."""
    folder = tmp_path_factory.mktemp("switched")
    more = ("callbacks.dynamic.gain=[0.1,3.0]", "trainer.max_epochs=8", "data.batch_size=50")
    more += ("optimizer.lr=0.1",)
    train(configure(folder, *TRAINING, *more), folder)
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_the_gradient_is_that_of_the_task_and_of_what_is_engaged(tmp_path: Path) -> None:
    """The oracle adds both losses up and asks autograd; the loss that is logged is the task's."""
    expected: list[tuple[Tensor, list[Tensor]]] = []
    results: list[tuple[Tensor, list[Tensor]]] = []

    def expect(trainer: L.Trainer, module: ElasticClassifier, batch: Any, _: int) -> None:
        buffers = {name: value.clone() for name, value in module.named_buffers()}
        x_BCHW, y_B = batch
        task = F.cross_entropy(module.structure.run_active(x_BCHW), y_B)
        loss = task + 7.0 * run.callbacks["dynamic"].costs[0].fraction("macs")
        expected.append((task.detach(), list(torch.autograd.grad(loss, trained_by(module)))))
        for name, value in module.named_buffers():
            value.copy_(buffers[name])

    def note(trainer: L.Trainer, module: ElasticClassifier, optimizer: Any) -> None:
        results.append((torch.empty(0), [p.grad.clone() for p in trained_by(module)]))  # type: ignore[union-attr]

    def note_loss(trainer: L.Trainer, module: ElasticClassifier, outputs: Any, *_: Any) -> None:
        results[-1] = outputs["loss"].detach(), results[-1][1]

    def trained_by(module: ElasticClassifier) -> list[nn.Parameter]:
        return [p for p in (*module.net.parameters(), *module.structure.parameters()) if p.requires_grad]

    look = {
        "before": (Spy(on_before_optimizer_step=note),),
        "after": (Spy(on_train_batch_start=expect, on_train_batch_end=note_loss),),
    }
    few = ("callbacks.dynamic.gain=7.0", "trainer.max_epochs=2")
    run = prepare(tmp_path, *TRAINING, *few, **look)
    run.fit()
    assert len(results) == len(expected) > 3
    for (loss, gradients), (task, by_hand) in zip(results, expected, strict=True):
        torch.testing.assert_close(loss, task)
        torch.testing.assert_close(gradients, by_hand, rtol=1e-3, atol=1e-6)
    assert any(iterate_modules(run.module))


def test_the_loss_sets_in_at_its_beginning_and_is_whole_at_its_end(tmp_path: Path) -> None:
    """Of 8 epochs the first two are the task's alone; the loss then grows for four."""
    held: list[float] = []

    def note(trainer: L.Trainer, module: ElasticClassifier, *_: Any) -> None:
        own = run.callbacks["dynamic"]
        share = float(own.costs[0].fraction("macs").detach())
        loss = own.compute_loss(None)
        held.append(0.0 if loss is None else float(loss.detach()) / (2.0 * share))

    options = ("callbacks.dynamic.begin=0.25", "callbacks.dynamic.end=0.75", "callbacks.dynamic.gain=2.0")
    short = ("data.batch_size=1000", "trainer.max_epochs=8")
    run = prepare(tmp_path, *TRAINING, *options, *short, after=(Spy(on_train_batch_end=note),))
    run.fit()
    assert held == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1])


def test_each_step_trains_one_set(tmp_path: Path) -> None:
    drawn: list[int] = []

    def note(trainer: L.Trainer, module: ElasticClassifier, *_: Any) -> None:
        (first, *others) = iterate_modules(module)
        assert all(m.active_set == first.active_set for m in others)
        for k, head in enumerate(first.heads):
            assert (head.linear.weight.grad is not None) == (k == first.active_set)  # type: ignore[union-attr]
        drawn.append(first.active_set)

    spy = Spy(on_before_optimizer_step=note)
    more = ("callbacks.dynamic.gain=[0.1,0.5,2.0]", "trainer.max_epochs=6")
    run = prepare(tmp_path, *TRAINING, *more, before=(spy,)).fit()
    assert set(drawn) == {0, 1, 2}
    assert {m.active_set for m in iterate_modules(run.module)} == {0}


def test_a_greater_gain_engages_less(finished: Path) -> None:
    sparing, greedy = (row["macs_dynamic"] for row in reversed(summary_of(finished)["sets"]))
    assert sparing < 0.9 * greedy


def test_the_summary_is_what_the_skipping_network_does(finished: Path) -> None:
    """Accuracy by counting its answers; MACs from the kernels that it engages."""
    summary = summary_of(finished)
    run = restore(finished)
    net, data, switched = run.network.plain(), run.data, run.network.dynamic()
    active, right, count = make_skipping(switched), 0, 0
    with torch.no_grad():
        for x_BCHW, y_B in read_test_batches(data):
            right += int((active(x_BCHW).argmax(1) == y_B).sum())
            count += len(y_B)
    assert right / count == pytest.approx(summary["test/acc"], abs=1.5 / count)
    seen = run_per_image(switched, data, run.task)
    assert round(seen.macs) == summary["macs_dynamic"] == summary["sets"][0]["macs_dynamic"]
    plain = sum(p.numel() for p in net.parameters())
    own = sum(p.numel() for m in iterate_modules(switched) for p in m.heads[0].parameters())
    assert summary["params"] == summary["params_dense"] == plain + own
    engaged = ActivationCost(switched, torch.zeros(1, *data.shape))
    assert summary["macs"] == engaged.dense_macs + engaged.module_macs
    assert evaluate(finished) == summary


def test_what_is_seen_adds_up(finished: Path) -> None:
    run = restore(finished)
    seen = run_per_image(run.network.dynamic(), run.data, run.task)
    assert len(seen.correct_N) == len(seen.macs_N) == len(seen.label_N) == 360
    kernels = torch.cat(list(seen.usage.values()))
    assert ((kernels >= 0) & (kernels <= 1)).all() and kernels.mean() < 1
    assert seen.macs_N.max() <= summary_of(finished)["macs"]


def test_kernel_usage_is_shown_and_drawn(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, table, classes = (tmp_path / name for name in ("usage.png", "usage.csv", "classes.csv"))
    given = [f"run={finished}", "set=1", f"figure={picture}", f"csv={table}", f"classes={classes}"]
    monkeypatch.setattr("sys.argv", ["usage", *given])
    usage.main()
    row = summary_of(finished)["sets"][1]
    assert f"test accuracy {row['test/acc']:.2%}, {row['macs_dynamic']:,} MACs" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    net = restore(finished).network.plain()
    kernels = sum(m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d))
    assert len(table.read_text().splitlines()) == 1 + kernels
    _, *rows = (line.split(",") for line in classes.read_text().splitlines())
    count_K, right_K, macs_K = np.array([[float(cell) for cell in cells] for _, *cells in rows]).T
    assert count_K @ right_K / count_K.sum() == pytest.approx(100 * row["test/acc"], abs=0.01)
    assert count_K @ macs_K / count_K.sum() == pytest.approx(row["macs_dynamic"], abs=1)


def test_time_is_measured_beside_macs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "BATCHES", (1, 4))
    monkeypatch.setattr(latency, "THREADS", (1,))
    # Compiling, and files for other runtimes, take half a minute.
    monkeypatch.setattr(latency, "make_rivals", lambda net, inputs, threads: {"PyTorch": net})
    table = tmp_path / "latency.csv"
    monkeypatch.setattr("sys.argv", ["latency", f"run={finished}", "images=6", "set=1", f"csv={table}"])
    latency.main()
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert [row[:2] for row in rows[1:]] == [["1", "1"], ["1", "4"]]
    assert all(float(value) > 0 for row in rows[1:] for value in row if value != "–")
    assert all(row.count("–") == 2 for row in rows[1:]), "no runtime is there"
    assert rows[1][-1] == rows[2][-1], "the same images engage the same MACs, however they are batched"
    assert "saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "name run=…"),
        (("run={run}", "colour=1"), "there is no option colour=1; there are: run=…, level=…, set=…"),
        (("run={run}", "set=last"), "set=last is no whole number"),
        (("run={run}", "level=0.5"), r"level=0\.5 is no whole number"),
        (("run={run}", "set=9"), "there is no set 9 of kernel activation modules: the network has 0 … 1"),
        (("run={run}", "level=3"), "there is no level 3: the run's network has level 0 alone"),
    ],
)
def test_what_kernel_usage_cannot_show_is_one_line(
    finished: Path, given: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["usage", *(text.format(run=finished) for text in given)])
    with pytest.raises(ElasticError, match=message):
        usage.main()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "name run=…"),
        (("run={run}", "images=0"), "with 0 images: set images to 1 or more"),
        (("run={run}", "set=x"), "set=x is no whole number"),
    ],
)
def test_what_latency_cannot_measure_is_one_line(
    finished: Path, given: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["latency", *(text.format(run=finished) for text in given)])
    with pytest.raises(OptionError, match=message) as caught:
        latency.main()
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three levels."""
    folder = tmp_path_factory.mktemp("runs") / "joint"
    levels = ("schedule=joint", "callbacks.joint.fractions=[0.5,0.75]", "optimizer.lr=2e-2")
    train(configure(folder, *EXACT, *levels, "data.batch_size=300"), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("callbacks.dynamic.gain=[0.1,1.0]",), marks=SLOW),
        pytest.param(
            (
                "callbacks.dynamic.activation=gumbel",
                "callbacks.dynamic.modules_only=true",
                "callbacks.dynamic.rate=3.0",
            ),
            marks=SLOW,
        ),
        pytest.param(
            (
                "callbacks.dynamic.activation=soft",
                "callbacks.dynamic.form=target",
                "callbacks.dynamic.target=0.5",
            ),
            marks=SLOW,
        ),
        pytest.param(("init={joint}", "callbacks.dynamic.gain=[0.1,1.0]"), marks=SLOW),
        (
            "callbacks.dynamic.start=saliency",
            "callbacks.dynamic.saliency=1.0",
            "callbacks.dynamic.activation=hard",
            "callbacks.dynamic.form=threshold",
            "callbacks.dynamic.target=0.7",
        ),
    ],
    ids=["sets", "gumbel", "soft", "levels", "saliency"],
)
def test_resumed_equals_uninterrupted(
    joint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    given = (*TRAINING, "trainer.max_epochs=4", *(option.format(joint=joint) for option in options))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(configure(whole, *given), whole)
    kill(configure(broken, *given), broken, monkeypatch, 2, 1)
    train(configure(broken, *given), broken)
    assert_same_run(whole, broken)


def test_the_network_itself_keeps_the_statistics_of_the_first_set(tmp_path: Path) -> None:
    run = trained(tmp_path, "callbacks.dynamic.gain=[0.1,1.0]").fit()
    norms = [module for module in run.module.modules() if isinstance(module, SetNorm)]
    assert norms
    for norm in norms:
        (own,) = norm._norm
        assert torch.equal(own.running_mean, norm.mean_SC[0]) and torch.equal(own.running_var, norm.var_SC[0])  # type: ignore[arg-type]
        assert not torch.equal(norm.mean_SC[0], norm.mean_SC[1])


@pytest.mark.slow
@pytest.mark.parametrize("init", ["null", "{joint}"])
def test_killed_when_all_is_trained_nothing_is_missing(joint: Path, tmp_path: Path, init: str) -> None:
    given = (*TRAINING, f"init={init.format(joint=joint)}", "callbacks.dynamic.gain=[0.1,1.0]")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(configure(broken, *given), broken)
    shutil.copytree(broken, whole)
    for name in ("model.safetensors", "summary.json"):
        (broken / name).unlink()
    train(configure(broken, *given), broken)
    assert_same_run(whole, broken)
    measured = [summary_of(folder) for folder in (whole, broken)]
    assert measured[0]["sets"] == measured[1]["sets"] and measured[0]["levels"] == measured[1]["levels"]


def trained(folder: Path, *options: str) -> Run:
    return prepare(folder, *TRAINING, *options)


@pytest.mark.parametrize("gain", ["1.0", "[0.1,1.0]"])
def test_the_modules_alone_may_be_trained(tmp_path: Path, gain: str) -> None:
    """The network keeps every bit, its norms' statistics too."""
    run = trained(tmp_path, "callbacks.dynamic.modules_only=true", f"callbacks.dynamic.gain={gain}")
    before = {name: tensor.clone() for name, tensor in run.module.net.state_dict().items()}
    run.fit()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.module.net.state_dict().items())
    assert any(
        not torch.equal(m.heads[0].linear.bias, torch.full_like(m.heads[0].linear.bias, 2.0))
        for m in iterate_modules(run.module)
    )  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("rate", [pytest.param(0.5, marks=SLOW), 4.0])
def test_modules_move_rate_times_as_far_as_the_network_in_a_step(tmp_path: Path, rate: float) -> None:
    """Under plain SGD, from the same start and the same batch."""
    sgd = ("optimizer=sgd", "lr_scheduler=constant", "optimizer.momentum=0.0")
    plain = ("optimizer.nesterov=false", "optimizer.weight_decay=0.0", *AT_ONCE)
    moved: dict[float, dict[str, Tensor]] = {}
    for each in (1.0, rate):
        given = (*EXACT, "schedule=dynamic", *sgd, *plain, f"callbacks.dynamic.rate={each}")
        run = prepare(tmp_path / str(each), *given)
        start: dict[str, Tensor] = {}

        def note(trainer: L.Trainer, module: ElasticClassifier, start: dict[str, Tensor] = start) -> None:
            start.update({name: p.detach().clone() for name, p in module.named_parameters()})

        run.trainer.callbacks.append(Spy(on_fit_start=note))  # type: ignore[attr-defined]
        run.trainer.fit_loop.epoch_loop.max_steps = 1
        run.fit()
        moved[each] = {name: p.detach() - start[name] for name, p in run.module.named_parameters()}
    for name, one in moved[1.0].items():
        factor = rate if name.startswith("structure.kernel_modules.") else 1.0
        torch.testing.assert_close(moved[rate][name], factor * one, rtol=1e-4, atol=1e-6)
    assert any(one.any() for name, one in moved[1.0].items() if name.startswith("structure.kernel_modules."))


def test_what_a_step_moves_a_score_does_not_grow_with_what_its_module_reads(tmp_path: Path) -> None:
    """Steps of Adam are of one size, and the noise of C of them adds up to √C of it."""
    run = prepare(tmp_path, *EXACT, "schedule=dynamic", "callbacks.dynamic.rate=3.0").fit()
    (own,) = run.module.structure.own.optimizers
    rates = {id(p): group["rate"] for group in own.param_groups for p in group["params"]}
    reads = set()
    for module in iterate_modules(run.module):
        linear = module.heads[0].linear
        assert isinstance(linear, nn.Linear)
        assert rates[id(linear.weight)] * linear.in_features**0.5 == pytest.approx(3.0)
        assert rates[id(linear.bias)] == 3.0
        reads.add(linear.in_features)
    assert len(reads) > 2
    stepped = {id(p) for group in run.trainer.optimizers[0].param_groups for p in group["params"]}
    assert stepped == {id(p) for p in run.module.net.parameters()} and not stepped & rates.keys()


@pytest.mark.parametrize(
    ("only", "gain"),
    [pytest.param(*both, marks=SLOW) for both in ((True, "1.0"), (False, "1.0"), (False, "[0.1,1.0]"))],
)
def test_each_level_has_modules_of_its_own(joint: Path, tmp_path: Path, only: bool, gain: str) -> None:
    """On levels that stay as they are to the last bit, or all learn; each is measured with its own."""
    gated = tmp_path / "gated"
    given = (f"init={joint}", "trainer.max_epochs=6", f"callbacks.dynamic.modules_only={only}")
    given += (f"callbacks.dynamic.gain={gain}",)
    summary = train(configure(gated, *TRAINING, *given), gated)
    finished = restore(gated)
    old, new, data, task = restore(joint).network.nets, finished.network, finished.data, finished.task
    assert [row["params"] for row in summary["levels"]] == sorted(row["params"] for row in summary["levels"])
    x_BCHW = read_test_batches(data)[0][0]
    with torch.no_grad():
        for before, after in zip(old, new.nets, strict=True):
            assert torch.equal(before(x_BCHW), after(x_BCHW)) == only
    switched = new.dynamic_nets
    assert len(switched) == len(summary["levels"]) == 3
    for net, row in zip(switched, summary["levels"], strict=True):
        seen = run_per_image(net, data, task)
        assert (seen.metrics["test/acc"], round(seen.macs)) == (row["test/acc"], row["macs_dynamic"])
    assert evaluate(gated, 1)["macs_dynamic"] == summary["levels"][1]["macs_dynamic"]
    executed = sum(count_macs(level, torch.zeros(1, *data.shape)) for level in old) / 3
    images = 6 * (len(data.train_set) // 300 * 300)  # type: ignore[arg-type]
    assert summary["macs_training"] == pytest.approx(3 * executed * images, rel=1e-6)


@pytest.mark.slow
def test_what_others_start_from_or_learn_from_has_its_modules(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without them it is another network: a run of it is refused, a file of it and a teacher have them."""
    run = restore(finished)
    net, data, switched = run.network.plain(), run.data, run.network.dynamic()
    x_BCHW = read_test_batches(data)[0][0]
    with torch.no_grad():
        assert torch.equal(restore_teacher(str(finished)).eval()(x_BCHW), switched(x_BCHW))
        assert not torch.equal(switched(x_BCHW), net(x_BCHW))
    taught = ("schedule=[static,distil]", f"callbacks.distil.teacher.run={finished}", "trainer.max_epochs=2")
    train(configure(tmp_path / "taught", *EXACT, *taught), tmp_path / "taught")
    refused = "another one without its kernel activation modules: take a run that has none"
    with pytest.raises(FileError, match=refused):
        train(configure(tmp_path / "next", *TRAINING, f"init={finished}"), tmp_path / "next")
    monkeypatch.setattr("sys.argv", ["export", f"run={finished}", f"to={tmp_path / 'net.pt2'}", "set=1"])
    export.main()
    assert "set 1 of its modules masks kernels, none is skipped" in capsys.readouterr().out
    with torch.no_grad():
        masked = torch.export.load(tmp_path / "net.pt2").module()(x_BCHW)
        torch.testing.assert_close(masked, run.network.run(x_BCHW, set=1), rtol=1e-5, atol=1e-5)


CONTROLS: dict[str, Callable[[torch.Tensor], bool]] = {
    "constant": lambda gates_BK: bool((gates_BK == gates_BK[0]).all()),
    "random": lambda gates_BK: not bool((gates_BK == gates_BK[0]).all()),
}


@pytest.mark.parametrize("kind", CONTROLS)
def test_controls_do_not_see_the_input(tmp_path: Path, kind: str) -> None:
    run = trained(tmp_path, f"callbacks.dynamic.kind={kind}", "callbacks.dynamic.gain=3.0").fit()
    run.module.eval()
    x_BCHW, _ = run.data.sample(64, seed=0)
    with torch.no_grad():
        run.module.structure.run_active(x_BCHW[:1].expand(64, -1, -1, -1))
        same = [m.active_BK.clone() for m in iterate_modules(run.module)]
        run.module.structure.run_active(x_BCHW)
    assert all(CONTROLS[kind](gates_BK) for gates_BK in same)
    assert all(float(m.heads[0].linear.weight.abs().max()) == 0 for m in iterate_modules(run.module))  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": []}, "0 gains, from 0.1 to 0.5 of the run: give one or more"),
        ({"begin": 0.6}, "from 0.6 to 0.5 of the run"),
        ({"end": 1.0}, "to 1.0 of the run"),
        ({"rate": 0.0}, "rate=0.0 cannot be: set it to a number above 0"),
        ({"form": "cubic"}, "an activation loss cannot be 'cubic'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneDynamically(**options)


@pytest.mark.parametrize("schedule", ["[growth,dynamic]", "[gates,dynamic]", "[ema,dynamic]"])
def test_other_ways_of_changing_the_network_are_refused(tmp_path: Path, schedule: str) -> None:
    with pytest.raises(
        TrainingError, match=r"cannot be in one run(: run .* first, and start from|.* leave AverageW)"
    ):
        train(configure(tmp_path, *EXACT, f"schedule={schedule}"), tmp_path)


@pytest.mark.parametrize("option", ["kind=smell", "activation=hope"])
def test_what_attach_refuses_is_refused_before_training(tmp_path: Path, option: str) -> None:
    with pytest.raises(OptionError, match=r"modules cannot look at 'smell'|activation='hope' cannot be"):
        train(configure(tmp_path, *TRAINING, f"callbacks.dynamic.{option}"), tmp_path)


class Centred(nn.Module):
    """It has a buffer of its own, and does by `self.training` what torch.fx takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 2)
        self.norm = nn.BatchNorm2d(6)
        self.register_buffer("mean", torch.full((1, 1, 1, 1), 0.1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.dropout(self.norm(self.one(x_BCHW - self.mean)).relu(), 0.5, self.training)
        return self.head(self.two(y_BCHW).relu().mean((2, 3)))  # type: ignore[no-any-return]


def program(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=2,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        **options,
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        **{"enable_model_summary": False, "accelerator": "cpu"},
    )


def its_module(
    kind: type[ElasticClassifier] = ElasticClassifier,
) -> tuple[ElasticClassifier, Tensor, torch.utils.data.DataLoader[Any]]:
    """And images, and a loader of them whose last batch has one only."""
    torch.manual_seed(0)
    x_NCHW = torch.randn(65, 1, 6, 6)
    data = torch.utils.data.TensorDataset(x_NCHW, (x_NCHW.mean((1, 2, 3)) > 0).long())
    module = kind(Centred(), (1, 6, 6), 2, partial(AdamW, lr=1e-2))
    return module, x_NCHW, torch.utils.data.DataLoader(data, batch_size=32)


@pytest.mark.parametrize("only", [True, False])
def test_a_network_is_validated_as_it_is_in_evaluation(only: bool) -> None:
    """Nothing is dropped, though what its modules are attached to has been traced; nor where it is frozen."""
    module, x_NCHW, loader = its_module()
    seen: list[bool] = []

    def twice(trainer: L.Trainer, module: ElasticClassifier, *_: Any) -> None:
        with torch.no_grad():
            seen.append(torch.equal(module(x_NCHW), module(x_NCHW)))

    spy = Spy(on_train_batch_end=twice, on_validation_batch_end=twice)
    program(PruneDynamically(0.5, modules_only=only), spy).fit(module, loader, loader)
    assert seen == ([only] * 3 + [True] * 3) * 2


def test_what_is_moved_is_moved_with_what_was_traced_of_it() -> None:
    module, x_NCHW, loader = its_module()
    program(PruneDynamically(0.5)).fit(module, loader, loader)
    with torch.no_grad():
        expected = module.eval().structure.run_active(x_NCHW)
        module.double()
        assert module.structure.dynamic_nets[0].mean is module.net.mean
        torch.testing.assert_close(module.structure.run_active(x_NCHW.double()).float(), expected)


def test_it_may_be_validated_before_it_is_trained_and_trained_twice_but_not_switched_twice() -> None:
    module, _, loader = its_module()
    own = PruneDynamically(0.5)
    program(own).validate(module, loader, verbose=False)
    program(own).fit(module, loader, loader)
    program(own).fit(module, loader, loader)
    program(PruneDynamically(0.5)).validate(module, loader, verbose=False)
    program(own).fit(its_module()[0], loader, loader)
    for other in (own, PruneDynamically(0.5)):  # its own has gone to another network
        with pytest.raises(TrainingError, match="another PruneDynamically's: continue with that"):
            program(other).fit(module, loader, loader)


def test_without_validation_the_first_set_rules_in_the_end() -> None:
    module, _, loader = its_module()
    drawn: list[int] = []
    spy = Spy(on_train_batch_end=lambda *_: drawn.append(next(iterate_modules(module)).active_set))
    program(PruneDynamically([0.1, 1.0, 2.0]), spy, limit_val_batches=0).fit(module, loader, loader)
    assert drawn[-1] != 0 and {m.active_set for m in iterate_modules(module)} == {0}
    assert {norm.active_set for norm in module.modules() if isinstance(norm, SetNorm)} == {0}


def test_several_sets_are_trained_in_one_process() -> None:
    """Each process would draw another set."""
    module, _, _ = its_module()
    trainer: Any = SimpleNamespace(world_size=2, callbacks=[])
    with pytest.raises(TrainingError, match="several sets, or levels, are trained in one process"):
        PruneDynamically([0.5, 1.0]).setup(trainer, module, "fit")
    PruneDynamically(0.5).setup(trainer, module, "fit")


def test_in_any_lightning_program() -> None:
    module, x_NCHW, loader = its_module()
    program(PruneDynamically(0.5)).fit(module, loader, loader)
    with torch.no_grad():
        expected = module.eval().structure.run_active(x_NCHW)
        torch.testing.assert_close(
            make_skipping(module.structure.dynamic_nets[0])(x_NCHW), expected, rtol=1e-4, atol=1e-5
        )
        assert not F.softmax(expected, 1).isnan().any()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # Lightning's, of LogPanels
def test_a_checkpoint_with_modules_is_evaluated_by_another_process(tmp_path: Path) -> None:
    """Its module has none yet; what cannot be continued with is refused in a line."""
    module, x_NCHW, loader = its_module()
    trainer = program(PruneDynamically([0.1, 3.0], begin=0.0, activation="scale", rate=20.0))
    trainer.fit(module, loader, loader)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    (expected,) = trainer.validate(module, loader, verbose=False)
    for callback in (PruneDynamically([0.1, 3.0]), LogPanels()):
        again, _, _ = its_module()
        (metrics,) = program(callback).validate(again, loader, path, verbose=False)
        assert metrics.items() <= expected.items() and "val/loss" in metrics
        with torch.no_grad():
            found = again.eval().structure.run_active(x_NCHW)
            assert torch.equal(found, module.eval().structure.run_active(x_NCHW))
    for other, message in (
        (
            PruneDynamically(0.1),
            "activation modules have sets=2, this run's sets=1: continue with the options",
        ),
        (
            LogPanels(),
            "has kernel activation modules: continue with the PruneDynamically that made",
        ),
    ):
        with pytest.raises(TrainingError, match=message):
            program(other).fit(its_module()[0], loader, loader, ckpt_path=path)


class Pausing(ElasticClassifier):
    """It calls its network in the second step of an epoch alone."""

    def training_step(self, batch: Any, index: int) -> Any:
        if index == 1:
            return super().training_step(batch, index)
        return sum(parameter.sum() for parameter in self.net.parameters()) * 0.0


@pytest.mark.parametrize("form", ["target", "threshold"])
def test_a_step_without_the_network_follows_no_target(form: Form) -> None:
    module, _, loader = its_module(Pausing)
    own, states = PruneDynamically(form=form, target=0.5, begin=0.0), []
    spy = Spy(on_train_batch_end=lambda *_: states.append(torch.stack([own.multiplier_LS, own.threshold_LS])))
    program(own, spy).fit(module, loader, loader)
    moves = [not torch.equal(one, other) for one, other in itertools.pairwise(states)]
    assert moves == [True, False, False, True, False]
    assert all(
        tensor.isfinite().all() for tensor in module.state_dict().values() if isinstance(tensor, Tensor)
    )


LOOKING = (
    "callbacks.dynamic.start=saliency",
    "callbacks.dynamic.saliency=1.0",
    "callbacks.dynamic.activation=hard",
    "callbacks.dynamic.form=threshold",
    "callbacks.dynamic.target=0.5",
    "callbacks.dynamic.end=0.5",
    "callbacks.dynamic.freeze=0.75",
)


@pytest.mark.slow
def test_kernels_close_on_the_path_to_the_target_and_the_choice_then_stays(tmp_path: Path) -> None:
    fractions: list[tuple[float, float]] = []
    weights: list[tuple[float, list[Tensor]]] = []

    def note(trainer: L.Trainer, module: ElasticClassifier, *_: Any) -> None:
        progress, own = measure_step_progress(trainer), run.callbacks["dynamic"]
        path = 1 - min(1.0, progress / 0.5) * 0.5
        fractions.append((path, float(own.costs[0].fraction("macs").detach())))
        weights.append(
            (progress, [m.get_head().linear.weight.detach().clone() for m in iterate_modules(module)])
        )

    more = ("trainer.max_epochs=8", "data.batch_size=50", "optimizer.lr=5e-3")
    run = prepare(tmp_path, *TRAINING, *LOOKING, *more, after=(Spy(on_train_batch_end=note),))
    run.fit()
    late = [abs(path - fraction) for path, fraction in fractions[-len(fractions) // 3 :]]
    assert fractions[0][1] > 0.98 and sum(late) / len(late) < 0.03
    assert all(fraction > path - 0.1 for path, fraction in fractions)
    assert all(
        torch.equal(one, other)
        for one, other in zip(weights[-1][1], next(w for at, w in weights if at > 0.77), strict=True)
    )
    moved = zip(weights[0][1], weights[-1][1], strict=True)
    assert not any(torch.equal(one, other) for one, other in moved)


def test_what_has_looked_measures_again_as_it_did(tmp_path: Path) -> None:
    cfg = configure(tmp_path, *TRAINING, *LOOKING, "callbacks.dynamic.difficulty=0.5")
    summary = train(cfg, tmp_path)
    assert summary["macs_dynamic"] < summary["macs"]
    assert evaluate(tmp_path) == summary_of(tmp_path)


def test_difficulty_is_that_of_classes(tmp_path: Path) -> None:
    run = prepare(tmp_path, *TRAINING, *LOOKING, "callbacks.dynamic.difficulty=1")
    run.module.structure.outputs = "values"
    with pytest.raises(TrainingError, match=r"telling classes: set callbacks\.dynamic\.difficulty=0"):
        run.fit()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "zero"}, "modules cannot start by 'zero': set start to order or saliency"),
        ({"modules_only": True, "freeze": 0.5}, "where modules alone are trained, they cannot freeze"),
        ({"form": "threshold"}, "has a target: set form to target or threshold and a target"),
        ({"difficulty": 1.0}, "nothing teaches modules what is difficult: set saliency above 0, or"),
    ],
)
def test_ways_of_looking_that_cannot_be_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneDynamically(**options)
