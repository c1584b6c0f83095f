"""A run, a sweep and all that they have started end on a signal, say how to go on, and lose nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import elastic.experiments.train
from elastic.experiments.train import train
from elastic.files import atomic
from tests.fitted import Spy, command
from tests.resuming import CHANGING, assert_same_run
from tests.runs import TINY, configure

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN = "start the same command again"


def hit(number: signal.Signals) -> Callable[..., None]:
    return lambda *_, **__: os.kill(os.getpid(), number)


def line(number: signal.Signals, advice: str) -> str:
    return f"stopped by {number.name}: {advice}\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    try:
        code, _, err = command(hit(number), monkeypatch, capsys)
    finally:  # a command's process ends with it; this one does not
        for each, handler in zip(SIGNALS, before, strict=True):
            signal.signal(each, handler)
    assert (code, err) == (128 + number, line(number, AGAIN))


@pytest.fixture
def handlers() -> Iterator[None]:
    before = [signal.getsignal(each) for each in SIGNALS]
    yield
    for each, handler in zip(SIGNALS, before, strict=True):
        signal.signal(each, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(configure(folder, *CHANGING), folder)
    return folder


def in_epoch(epoch: int) -> Callable[[signal.Signals], dict[str, Any]]:
    def hook(number: signal.Signals) -> dict[str, Any]:
        def strike(trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == epoch:
                os.kill(os.getpid(), number)

        return {"on_train_batch_end": strike}

    return hook


WHEN: dict[str, Callable[[signal.Signals], dict[str, Any]]] = {
    "in training": in_epoch(3),
    "in its first epoch": in_epoch(0),
    "in validation": lambda n: {"on_validation_batch_end": hit(n)},
    "before it": lambda n: {"setup": hit(n)},
    "in the test": lambda n: {"on_fit_end": hit(n)},
}


@pytest.mark.slow
@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("when", "number"), list(product(WHEN, SIGNALS)))
def test_a_run_that_is_stopped_goes_on_and_is_the_whole_run(
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
    number: signal.Signals,
) -> None:
    broken = tmp_path / "broken"
    make_callbacks = elastic.experiments.train.make_callbacks
    with monkeypatch.context() as patch:
        spy = Spy(**WHEN[when](number))
        patch.setattr(
            elastic.experiments.train, "make_callbacks", lambda cfg: make_callbacks(cfg) | {"spy": spy}
        )
        code, _, err = command(
            elastic.experiments.train.main, monkeypatch, capsys, *CHANGING, f"run={broken}"
        )
    assert (code, err) == (128 + number, line(number, f"go on with elastic train run={broken}"))
    assert not (broken / "summary.json").exists()
    code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, f"run={broken}")
    assert code == 0, err
    assert_same_run(whole, broken)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    "name",
    [
        "last.ckpt",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("config.yaml", "timeline.jsonl", "model.safetensors", "summary.json")
        ),
    ],
)
def test_a_write_that_is_stopped_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Half-way, where the file has a part of its bytes."""
    replace = os.replace

    def strike(part: Path, path: Path) -> None:
        if path.name == name:
            part.write_bytes(part.read_bytes()[:10])
            os.kill(os.getpid(), signal.SIGTERM)
        replace(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", strike)
        given = (*TINY, f"run={tmp_path}", "schedule=gates")
        code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, *given)
    assert code == 143 and err.count("\n") == 1
    assert not (tmp_path / name).exists() and not list(tmp_path.glob("*.part"))
    assert (
        command(
            elastic.experiments.train.main,
            monkeypatch,
            capsys,
            *(given if name == "config.yaml" else given[-2:-1]),
        )[0]
        == 0
    )
    assert (tmp_path / "summary.json").exists()


# --- by processes -------------------------------------------------------------------------------------------

LONG = ("experiment=smoke", "trainer.accelerator=cpu", "trainer.max_epochs=300", "callbacks.progress=null")


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "experiments.train", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for(process: "subprocess.Popen[str]", pattern: str, folder: Path, count: int = 1) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def list_group(group: int) -> list[int]:
    """List the processes of a group that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("seconds", [0.7, 2.0])
def test_a_command_that_still_imports_ends(tmp_path: Path, number: signal.Signals, seconds: float) -> None:
    process = start(tmp_path, f"run={tmp_path / 'run'}", *LONG)
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (128 + number, line(number, AGAIN))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes there")
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL])
@pytest.mark.parametrize("many", ["a sweep", "two processes"])
def test_all_that_a_command_has_started_ends_with_it(
    tmp_path: Path, number: signal.Signals, many: str
) -> None:
    if many == "a sweep":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        more = ("-m", "seed=0,1,2,3", "hydra/launcher=cores", f"hydra.sweep.dir={tmp_path}")
    elif number == signal.SIGKILL:
        pytest.skip("Lightning's own processes")
    else:
        more = (f"run={tmp_path / 'run'}", "trainer.devices=2", "trainer.strategy=ddp")
    process = start(tmp_path, *more, *LONG)
    try:
        wait_for(process, "*/last.ckpt", tmp_path, count=2 if many == "a sweep" else 1)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        if number != signal.SIGKILL:
            assert process.returncode == 128 + number
            assert err.splitlines()[-1].startswith(f"stopped by {number.name}: ")
        deadline = time.monotonic() + 10
        while list_group(process.pid):
            assert time.monotonic() < deadline, "they live on"
            time.sleep(0.1)
    finally:
        if list_group(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
