"""Distillation: its gradient against the paper's, a teacher that stays as it is, runs that are killed."""

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import elastic.experiments.train
from elastic.callbacks import Distil
from elastic.errors import OptionError, TrainingError
from elastic.experiments.tools.restore import restore_teacher
from elastic.experiments.train import train
from elastic.training.answers import Answers
from tests.fitted import EXACT, Run, Spy, command, prepare
from tests.resuming import assert_same_run, kill
from tests.runs import configure, load

SLOW = pytest.mark.slow
TRAINING = (*EXACT, "data.batch_size=300", "trainer.max_epochs=3", "optimizer.lr=2e-2")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    train(configure(folder, *TRAINING, "schedule=static"), folder)
    return folder


class Says(nn.Module):
    """A network that says the same, whatever it sees."""

    def __init__(self, logits_BK: torch.Tensor) -> None:
        super().__init__()
        self.logits_BK = logits_BK

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.logits_BK


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.5, 4.0)])
def test_the_gradient_is_that_of_the_paper(weight: float, temperature: float) -> None:
    """Of T² times the cross entropy of soft targets, by the logits: T (q - p), section 2."""
    torch.manual_seed(0)
    given_BK, asked_BK = torch.randn(6, 10, dtype=torch.double, requires_grad=True), torch.randn(6, 10)
    teacher = Says(asked_BK)
    distil = Distil(teacher, weight, temperature, outputs="classes")
    distil.compute_loss(given_BK, torch.zeros(6, 1)).backward()  # type: ignore[no-untyped-call]
    q_BK, p_BK = (given_BK / temperature).softmax(1), (asked_BK / temperature).softmax(1)
    torch.testing.assert_close(given_BK.grad.float(), (weight * temperature * (q_BK - p_BK) / 6).float())


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "schedule",
    [pytest.param("[static,distil]", marks=pytest.mark.slow), "[dynamic,distil]", "[gates,distil]"],
)
def test_the_teacher_is_what_the_run_starts_from(first: Path, tmp_path: Path, schedule: str) -> None:
    """Its loss is nothing at the very start, and it is the same network at the very end."""
    seen: dict[str, Any] = {}

    @torch.no_grad()
    def start(trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 0:
            x_BCHW = batch[0]
            seen["start"] = copy.deepcopy(module.net).eval()(x_BCHW)
            seen["x"] = x_BCHW
            seen["term"] = run.callbacks["distil"].compute_loss(seen["start"], x_BCHW)

    run = prepare(
        tmp_path, *TRAINING, f"schedule={schedule}", f"init={first}", after=(Spy(on_train_batch_start=start),)
    )
    run.fit()
    assert abs(float(seen["term"])) < 1e-6
    taught_by = run.callbacks["distil"].teacher
    torch.testing.assert_close(taught_by(seen["x"]), seen["start"])
    assert not taught_by.training
    run.module.eval()
    assert not torch.allclose(run.module(seen["x"]), seen["start"])
    assert not any("teacher" in name for name in load(tmp_path / "last.ckpt")["state_dict"])


@pytest.mark.slow
def test_another_run_can_teach(first: Path, tmp_path: Path) -> None:
    """A network from scratch comes closer to the teacher than one that it does not teach."""
    longer = (*TRAINING, "trainer.max_epochs=10", "optimizer.lr=1e-2", "seed=3")
    other = tmp_path / "other"
    train(configure(other, *TRAINING, "schedule=static", "model.channels=[6,6,6]"), other)
    apart = {}
    for schedule in ("static", "[static,distil]"):
        taught = ("callbacks.distil.weight=10", f"callbacks.distil.teacher.run={other}")
        given = (*longer, f"schedule={schedule}", *(taught if "distil" in schedule else ()))
        run = prepare(tmp_path / schedule, *given).fit()
        x_BCHW, _ = run.data.sample(64, seed=0)
        with torch.no_grad():
            said_BK, held_BK = (
                net.eval()(x_BCHW).softmax(1) for net in (run.module.net, restore_teacher(str(other)))
            )
        apart[schedule] = float((said_BK - held_BK).abs().mean())
    assert apart["[static,distil]"] < 0.7 * apart["static"]


def test_a_teacher_does_not_move_the_seed(first: Path, tmp_path: Path) -> None:
    """The run's own seed rules what it draws, whatever seed the teacher's run had."""
    start = []
    for name, given in {"alone": ("schedule=static",), "taught": ("schedule=[static,distil]",)}.items():
        taught = (f"callbacks.distil.teacher.run={first}",) if name == "taught" else ()
        run = prepare(tmp_path / name, *TRAINING, "seed=5", *given, *taught)
        start.append((torch.rand(3), next(run.module.net.parameters()).detach().clone()))
    assert all(torch.equal(a, b) for a, b in zip(*start, strict=True))


def test_a_teacher_of_other_classes_or_images_is_refused(first: Path, tmp_path: Path) -> None:
    run = prepare(tmp_path, *TRAINING, "schedule=[static,distil]", f"init={first}")
    for asked, says in [
        (
            Says(torch.zeros(1, 7)),
            r"the teacher's outputs for an image are of \(1, 7\), the network's of \(1, 10\): name the",
        ),
        (
            Says(torch.zeros(2, 10)),
            r"for an image are of \(2, 10\), the network's of \(1, 10\)",
        ),  # two networks'
        (
            nn.Conv2d(5, 10, 3),
            r"the teacher cannot look at images of \(1, 8, 8\): name the run of one that can",
        ),
    ]:
        run.callbacks["distil"].teacher = asked
        with pytest.raises(TrainingError, match=says):
            run.fit()


def test_it_holds_the_network_to_the_teacher(first: Path, tmp_path: Path) -> None:
    apart = {}
    for schedule in ("static", "[static,distil]"):
        run = prepare(tmp_path / schedule, *TRAINING, f"schedule={schedule}", f"init={first}")
        held = copy.deepcopy(run.module.net).eval()
        if schedule != "static":
            run.callbacks["distil"].weight = 100.0
        run.fit()
        x_BCHW, _ = run.data.sample(64, seed=0)
        with torch.no_grad():
            said_BK = run.module.net.eval()(x_BCHW).softmax(1)
            apart[schedule] = float((said_BK - held(x_BCHW).softmax(1)).abs().mean())
    assert apart["[static,distil]"] < 0.5 * apart["static"]


def test_a_teacher_asked_beforehand_says_what_it_says_in_each_step(first: Path, tmp_path: Path) -> None:
    """Without augmentation, that is; it looks at each image once a view, and never in a step."""
    weights, seen = [], []
    for views in (0, 2):
        given = ("schedule=[static,distil]", f"callbacks.distil.teacher.run={first}", "data.batch_size=400")
        run = prepare(tmp_path / str(views), *TRAINING, *given, f"callbacks.distil.views={views}")
        counts: list[int] = []
        run.callbacks["distil"].teacher.register_forward_pre_hook(
            lambda net, x, counts=counts: counts.append(len(x[0]) * (x[0].device.type != "meta"))
        )
        run.fit()
        weights.append([p.detach() for p in run.module.net.parameters()])
        seen.append(counts)
        images = len(run.data.train_set)  # type: ignore[arg-type]
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert sum(seen[0]) == 3 * (images // 400) * 400
    assert sum(seen[1]) == 2 * images


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
def test_answers_are_those_about_the_batch_also_after_a_restart_in_the_middle_of_an_epoch(
    first: Path, tmp_path: Path
) -> None:
    given = (*TRAINING, "schedule=[static,distil]", f"init={first}", "callbacks.distil.views=1")
    given += (
        "+callbacks.checkpoint.every_n_train_steps=6",
        "callbacks.checkpoint.save_on_train_epoch_end=false",
    )
    given += ("trainer.max_epochs=2",)
    seen: list[int] = []

    def start(folder: Path) -> Run:
        run = prepare(folder, *given)
        distil = run.callbacks["distil"]

        def compare(net: nn.Module, args: tuple[torch.Tensor]) -> None:
            if net.training and distil.answers is not None:
                expected_BK = distil.teacher(args[0])
                torch.testing.assert_close(
                    distil.answers.find(len(args[0])), expected_BK, rtol=1e-3, atol=1e-4
                )
                seen.append(len(args[0]))

        run.module.net.register_forward_pre_hook(compare)
        return run

    start(tmp_path).fit()
    whole = len(seen)
    assert whole == 8
    seen.clear()
    start(tmp_path).fit(ckpt_path=tmp_path / "last.ckpt")
    assert seen


def test_a_teacher_that_cannot_be_asked_beforehand_is_refused(first: Path, tmp_path: Path) -> None:
    given = (*TRAINING, "schedule=[static,distil]", f"init={first}", "callbacks.distil.views=1")
    with pytest.raises(TrainingError, match=r"has not seen images mixed: set task\.mixup=0"):
        prepare(tmp_path, *given, "task.mixup=0.1").fit()
    run = prepare(tmp_path, *given)
    loader = DataLoader(TensorDataset(*run.data.sample(100, seed=0)), batch_size=50)
    with pytest.raises(TrainingError, match=r"about elastic\.data\.ImageData alone: use it, or set"):
        run.trainer.fit(run.module, loader, loader)
    answers = Answers(torch.zeros(4, 3))
    answers.batches = (torch.arange(3),)
    with pytest.raises(TrainingError, match="with 2 of the 3 images of a batch"):
        answers.find(2)
    assert answers.find(3).shape == (3, 3)


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(each, marks=SLOW)
        for each in (
            "[dynamic,distil]",
            "[reconstruct,distil]",
            "[static,distil]",
            "[growth,gates,ema,distil]",
        )
    ],
)
def test_resumed_equals_uninterrupted(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    given = (*TRAINING, f"schedule={schedule}", f"init={first}", "trainer.max_epochs=6")
    if "reconstruct" in schedule:
        given += ("callbacks.reconstruct.dense=0", "callbacks.reconstruct.prune=0.5")
    if "growth" in schedule:  # from scratch, taught by another network
        given = tuple(option for option in given if not option.startswith("init="))
        given += (f"callbacks.distil.teacher.run={first}", "model.channels=[3,3,3,4]", "task.mixup=0.2")
        given += ("trigger=periodic", "trigger.every=1", "callbacks.gates.budget=700", "data.val_fraction=0")
    if "static" in schedule:  # asked beforehand, about images that are augmented
        given = (*(option for option in given if option != "~data.augment"), "callbacks.distil.views=2")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(configure(whole, *given), whole)
    kill(configure(broken, *given), broken, monkeypatch, 4, 1)
    train(configure(broken, *given), broken)
    assert_same_run(whole, broken)


def test_training_costs_what_the_teacher_costs_too(first: Path, tmp_path: Path) -> None:
    given = (*TRAINING, "schedule=[static,distil]", f"init={first}")
    summary = train(configure(tmp_path, *given), tmp_path)
    alone = json.loads((first / "summary.json").read_text())
    assert summary["macs"] == alone["macs"]
    assert summary["macs_training"] * 3 == alone["macs_training"] * 4  # backward is twice forward


@pytest.mark.parametrize("options", [{"weight": 0}, {"weight": -1}, {"temperature": 0}])
def test_options_that_cannot_be_are_refused(options: Any) -> None:
    with pytest.raises(OptionError, match=r"(weight|temperature)=.* cannot be: set it to a number above 0"):
        Distil(nn.Identity(), **options)


def test_without_a_start_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(
        elastic.experiments.train.main,
        monkeypatch,
        capsys,
        *EXACT,
        "schedule=[static,distil]",
        f"run={tmp_path / 'run'}",
    )
    assert code == 1
    assert err.splitlines()[-1] == "error: there is nobody to learn from: set init=<folder of a finished run>"
