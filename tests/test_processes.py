"""Runs of two processes: decided once, equal everywhere, and the same run as one process makes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from elastic.experiments.tools import processes as together
from elastic.experiments.tools.trials.forks import fork, run_in_fork
from elastic.experiments.train import main, train
from elastic.training import processes
from elastic.training.processes import find_differing_processes
from tests import foreign
from tests.fitted import command
from tests.runs import TINY, configure, load

ROOT = Path(__file__).parents[1]
CHANGING = (
    *TINY,
    "experiment=smoke",
    "trainer.precision=32-true",
    "trigger=periodic",
    "trigger.every=1",
    "callbacks.growth.amount.factor=1.3",
    "callbacks.growth.until=0.8",
    "callbacks.gates.begin=0",
    "callbacks.gates.end=0.8",
    "callbacks.gates.grain=kernel",
)
TWO = ("trainer.devices=2", "trainer.strategy=ddp")
MODEL = "model._target_=tests.nets.without_norms"


def start(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    """A run from the command line, in processes of its own; `ddp` starts the others itself."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", f"run={folder}", *overrides],
        **{"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning:elastic"},
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_follow_one(tmp_path: Path) -> None:
    """The same global batches; sums differ in their order only. Each process leaves its own files alone."""
    same = (*CHANGING, MODEL, "~data.augment", "trainer.max_epochs=4", "callbacks.gates.penalty=1e-4")
    two = start(tmp_path / "two", *same, *TWO, "data.batch_size=100")
    summary = train(configure(tmp_path / "one", *same, "data.batch_size=200"), tmp_path / "one")
    out = finish(two)
    assert out.count("test accuracy") == 1, "one process tests and tells"
    assert events(tmp_path / "one") == events(tmp_path / "two") != []
    one, other = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("one", "two")
    )
    weights = [name for name in one if name.startswith("net.")]
    assert weights and one.keys() == other.keys()
    for name in weights:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)
    found = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert found["params"] == summary["params"]
    assert found["test/acc"] == pytest.approx(summary["test/acc"], abs=0.01)


@pytest.mark.slow
def test_two_processes_train_a_module_that_knows_nothing_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Growth and gates in any Lightning program: bit for bit in both, and as one process makes it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # a test before may have left it, for all processes
    run = subprocess.run(
        [sys.executable, "-m", "tests.foreign", str(tmp_path), "2"],
        **{"cwd": ROOT, "text": True, "capture_output": True, "timeout": 200},
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert run.returncode == 0, run.stderr
    foreign.run(tmp_path, 1)
    one, first, second = (load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert first["timeline"] == second["timeline"] == one["timeline"]
    assert {event["why"].partition(":")[0] for event in one["timeline"]} == {"grow", "prune"}
    for name, value in first["net"].items():
        assert torch.equal(value, second["net"][name]), name
        torch.testing.assert_close(value, one["net"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_prune_by_magnitude_as_one(tmp_path: Path) -> None:
    """After growth. Every process ends with the same structure, zeros and weights, to the last bit."""
    smallest = (
        "schedule=[growth,magnitude]",
        "callbacks.magnitude.budget=150",
        "optimizer.lr=2e-2",
    )
    growing = (
        "trigger=periodic",
        "trigger.every=1",
        "callbacks.growth.until=0.3",
        "callbacks.growth.fresh=random",
    )
    exact = ("experiment=smoke", "trainer.precision=32-true", "~data.augment", "trainer.max_epochs=6")
    same = (*TINY, *exact, *smallest, *growing, MODEL)

    def witnessed(name: str) -> str:
        return f"+callbacks.witness={{_target_: tests.witnesses.Witness, folder: {tmp_path / name}-end}}"

    two = start(tmp_path / "two", *same, *TWO, "data.batch_size=100", witnessed("two"))
    alone = configure(tmp_path / "one", *same, "data.batch_size=200", witnessed("one"))
    summary = train(alone, tmp_path / "one")
    finish(two)
    told = events(tmp_path / "two")
    assert {event["why"].partition(":")[0] for event in told} == {"grow", "prune"}
    assert told == events(tmp_path / "one")
    one, first, second = (load(tmp_path / name) for name in ("one-end/0.pt", "two-end/0.pt", "two-end/1.pt"))
    assert one.keys() == first.keys() == second.keys() and len(list((tmp_path / "two-end").iterdir())) == 2
    closed = 0
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-4)
        closed += int((value < 0).sum()) if name.endswith("score") else 0
    assert closed > 0
    found = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert found["params"] == summary["params"] == found["budget/actual"] <= 150


@pytest.mark.slow
def test_two_processes_charge_the_same(tmp_path: Path) -> None:
    """Each engages other kernels, on images of its own."""
    target = ("callbacks.dynamic.form=target", "callbacks.dynamic.target=0.3", "callbacks.dynamic.end=0.3")
    end = tmp_path / "end"
    witness = f"+callbacks.witness={{_target_: tests.witnesses.MultiplierWitness, folder: {end}}}"
    options = (*TINY, "experiment=smoke", "schedule=dynamic", *target, MODEL, witness)
    finish(start(tmp_path / "run", *options, *TWO))
    first, second = (load(end / f"{rank}.pt") for rank in (0, 1))
    assert first.item() > 0 and torch.equal(first, second)


@pytest.mark.slow
def test_killed_and_continued_is_never_killed(tmp_path: Path) -> None:
    """Growth in width and depth, pruning, a budget and the freeze, with batch norm, bit for bit."""
    more = (
        "model=resnet20",
        "model.width=2",
        "callbacks.growth.amount.blocks=1",
        "callbacks.gates.penalty=0.3",
    )
    long = (*CHANGING, *TWO, *more, "callbacks.gates.budget=2500", "trainer.max_epochs=6")
    folder = tmp_path / "killed"
    broken = start(folder, *long)
    while not (folder / "last.ckpt").exists():
        assert broken.poll() is None, broken.communicate()
        time.sleep(0.05)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.communicate()
    finish(start(folder))
    finish(start(tmp_path / "whole", *long))
    assert sum("stage" in event for event in events(folder)) == 3
    for name in ("timeline.jsonl", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["budget/actual"] <= 2500


@pytest.mark.slow
def test_a_process_that_dies_before_the_others_meet_it_is_told_of(tmp_path: Path) -> None:
    """The first one waits for it, for half an hour if nobody ends it."""
    run = start(tmp_path / "run", *CHANGING, *TWO, "model._target_=tests.nets.lethal_to_the_second")
    _, err = run.communicate(timeout=100)
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert run.returncode == 1 and "Traceback" not in err
    assert told == [
        f"error: process 2 of 2 has ended by SIGKILL: go on with elastic train run={tmp_path / 'run'}"
    ]


@pytest.mark.slow
def test_when_the_first_process_dies_the_other_ends_with_a_line_at_most(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = start(folder, *CHANGING, *TWO, "trainer.max_epochs=1000")
    while not (folder / "last.ckpt").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.kill()
    _, err = run.communicate(timeout=30)  # until nobody writes there any more
    assert "Traceback" not in err and err.count("error: ") <= 1


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "by SIGKILL"),
        (lambda: os._exit(3), "with exit code 3"),
        (lambda: os._exit(0), None),
    ],
)
def test_one_process_that_fails_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[], None], how: str | None
) -> None:
    monkeypatch.setattr(together, "PATIENCE_S", 0.1)
    said = tmp_path / "said"

    def first() -> None:
        second, third = fork(end), fork(lambda: time.sleep(60))
        (tmp_path / "third").write_text(str(third))
        together.watch_processes([second, third])
        time.sleep(30 if how else 1)
        os.kill(third, signal.SIGKILL)

    code = run_in_fork(first, said)
    assert code == int(how is not None)
    lines = said.read_text().splitlines()
    assert [line.rpartition(": ")[0] for line in lines] == [f"error: process 2 of 3 has ended {how}"] * code
    third = Path("/proc") / (tmp_path / "third").read_text()
    until = time.monotonic() + 10
    while third.exists() and "Z" not in (third / "stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < until, "it is left alone"
        time.sleep(0.01)


def test_a_system_without_waitid_has_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "waitid")
    before = threading.active_count()
    together.watch_processes([os.getpid()])
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("trainer.strategy=ddp_spawn", "trainer.devices=2"), "set trainer.strategy=ddp"),
        (("-m", "seed=0,1", *TWO), "a sweep cannot start runs of several processes"),
    ],
)
def test_other_ways_to_start_processes_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    key = "hydra.sweep.dir" if "-m" in arguments else "run"
    code, _, err = command(main, monkeypatch, capsys, *arguments, *CHANGING, f"{key}={tmp_path / 'run'}")
    assert code == 1 and err.strip().splitlines()[-1].startswith("error: ") and said in err
    assert "Traceback" not in err and not (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.parametrize("changed", ["nothing", "a weight", "a moment"])
def test_processes_that_differ_are_named(monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    """What the other process holds is known from its digest, which is taken here, one after the other."""
    digests: list[str] = []

    def gather(found: list[str], mine: str) -> None:
        digests.append(mine)
        found[:] = [digests[0], digests[-1]]

    monkeypatch.setattr(processes.torch.distributed, "all_gather_object", gather)
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    trainer: Any = SimpleNamespace(world_size=2, optimizers=[optimizer])
    assert find_differing_processes(trainer, net) == []
    if changed == "a weight":
        net.weight.data[0, 0] += 1e-6
    if changed == "a moment":
        optimizer.state[net.bias]["exp_avg"][0] += 1e-6
    assert find_differing_processes(trainer, net) == ([] if changed == "nothing" else [1])
    assert find_differing_processes(SimpleNamespace(world_size=1), net) == []  # type: ignore[arg-type]
