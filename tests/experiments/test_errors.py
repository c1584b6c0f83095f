"""Errors that a user can mend: one line that names the thing, exit code 1, nothing half-finished left."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import elastic.experiments.compare
import elastic.experiments.train
from elastic.errors import TrainingError
from elastic.experiments.tools.composition import rewrite
from elastic.experiments.tools.environment import explain_faults
from elastic.experiments.tools.errors import format_error, run
from elastic.experiments.tools.folders import extend
from tests.fitted import EXACT, Spy, command, fit
from tests.resuming import assert_same_run
from tests.runs import load, load_history

ROOT = Path(__file__).parents[2]
SMOKE = ("experiment=smoke", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "data.batch_size=256")


def told(err: str, code: int) -> str:
    """The error line, which is all that there is."""
    lines = err.strip().splitlines()
    assert code == 1 and len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    return lines[0].removeprefix("error: ")


def process(*arguments: str, module: str = "experiments.train", **options: Any) -> tuple[int, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": False, **options},
    )
    return done.returncode, done.stderr


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "an unknown key": (("nonsense=1",), "there is no option nonsense: a run has callbacks, "),
    "an unknown key of a group": (("data.nonsense=1",), "a new one is added by +data.nonsense=1"),
    "an option that is nearly one": (("trainer.max_epoch=1",), "did you mean trainer.max_epochs?"),
    "an option without its group": (("lr=1",), "did you mean optimizer.lr?"),
    "an option of a callback without its group": (("budget=1",), "did you mean callbacks.gates.budget?"),
    "a group that is nearly one": (("optimiser=sgd",), "did you mean optimizer?"),
    "several values without -m": (("seed=0,1",), "seed=0,1 is several values: add -m"),
    "a range without -m": (("seed=range(2)",), "seed=range(2) is several values: add -m"),
    "an unknown experiment": (("experiment=nonsense",), "choose cifar10, "),
    "an unknown model": (("model=resnet99",), "choose alexnet, convnet, narrow, resnet20"),
    "an unknown schedule": (("schedule=[growth,nonsense]",), "choose distil, dynamic, ema, gates"),
    "an option that no callback takes": (
        ("schedule=static", "callbacks.gates.budget=2000"),
        "nothing takes callbacks.gates.budget=2000: this run has no 'gates'",
    ),
    "no callback": (("callbacks.gates=nonsense",), "callbacks.gates=nonsense is no callback"),
    "a learning rate below 0": (
        ("optimizer.lr=-1",),
        "optimizer.lr=-1 cannot be: set it to a number",
    ),
    "a scheduler's option of another type": (
        ("lr_scheduler=multistep", "lr_scheduler.milestones=3"),
        "lr_scheduler.milestones=3 cannot be: set it to a list",
    ),
    "an unknown flag": (("-x",), "there is no -x"),
    "no override at all": (("model={a",), "model={a cannot be read: a text with such signs goes in quotes"),
    "the folder of one run for several": (("seed=0,1", "-m"), "with -m name all runs' by hydra.sweep.dir="),
    "missing data": (("data=mnist", "data.download=false", "data.root=/nonexistent"), "/nonexistent"),
    "a ceiling below the start": (("callbacks.growth.amount.ceiling=0.5",), "ceiling=0.5 cannot be"),
    "an unknown start": (("callbacks.growth.fresh=ones",), "'ones'"),
    "an unknown grain": (("callbacks.gates.grain=ones",), "'ones'"),
    "an unknown metric": (("callbacks.growth.monitor=val/f1",), "val/f1"),
    "more in a batch than there is": (("data.batch_size=5000",), "batch_size 5000"),
    "a batch size that is no number": (
        ("data.batch_size=many",),
        "batch_size='many' cannot be",
    ),
    "an unknown precision": (("trainer.precision=int4",), "int4"),
    "a GPU that is not there": (("trainer.accelerator=gpu",), "gpu"),
    "no channels": (("model.channels=[]",), "channels"),
    "no epochs": (("trainer.max_epochs=0",), "max_epochs"),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("what", list(WRONG))
def test_a_setting_that_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    if what == "a GPU that is not there" and torch.cuda.is_available():
        pytest.skip("it is there")
    wrong, named = WRONG[what]
    given = [*SMOKE, f"run={tmp_path / 'run'}", *wrong]
    if what == "an unknown experiment":
        given.remove("experiment=smoke")
    code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, *given)
    assert named in told(err, code)
    left = {p.name for p in (tmp_path / "run").rglob("*")} if (tmp_path / "run").exists() else set()
    assert not left & {"summary.json", "model.safetensors", "last.ckpt"}
    assert not any(name.endswith(".part") for name in left)


@pytest.mark.parametrize("name", ["a file", "a file/run"])
def test_a_run_has_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "a file").touch()
    code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, f"run={tmp_path / name}")
    assert told(err, code).endswith(f"{tmp_path / 'a file'} is a file: name a folder")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errno.EEXIST, "x is no folder, or lies in what is none: name another one"),
        (errno.ENOTDIR, "x is no folder, or lies in what is none: name another one"),
        (errno.EACCES, "x cannot be used (Permission denied): name another one, or make it so"),
    ],
)
def test_what_the_system_refuses_is_told_by_its_path(kind: int, said: str) -> None:
    assert format_error(OSError(kind, os.strerror(kind), "x")) == said


@pytest.mark.slow
def test_by_process(tmp_path: Path) -> None:
    """Once for real: what the shell sees."""
    code, err = process(*SMOKE, f"run={tmp_path / 'run'}", "callbacks.growth.amount.ceiling=0.5")
    assert told(err, code).startswith(
        "callbacks.growth.amount.ceiling=0.5 cannot be: set it to a number from 1"
    )
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["an unknown key", "an unknown experiment", "missing data"])
def test_others_by_process(tmp_path: Path, what: str) -> None:
    wrong, named = WRONG[what]
    code, err = process(f"run={tmp_path / 'run'}", *wrong)
    assert named in told(err, code)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_home_folder_is_written_as_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ("run=~/runs/one", "debug=batch", "trainer.accelerator=cpu")
    assert command(elastic.experiments.train.main, monkeypatch, capsys, *given)[0] == 0
    assert (tmp_path / "runs" / "one" / "summary.json").exists() and not Path("~").exists()


def test_a_folder_that_holds_a_run_is_not_given_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (*SMOKE, f"run={tmp_path}")
    assert command(elastic.experiments.train.main, monkeypatch, capsys, *given)[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, f"run={tmp_path}", "seed=1")
    assert f"{tmp_path} holds a run already" in told(err, code)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_run_is_continued_for_more_epochs_but_not_for_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*options: str) -> tuple[int, str]:
        code, _, err = command(
            elastic.experiments.train.main, monkeypatch, capsys, f"run={tmp_path}", *options
        )
        return code, err

    def read_epochs() -> list[int]:
        rows = (tmp_path / "history.jsonl").read_text().splitlines()
        return [json.loads(row)["epoch"] for row in rows]

    assert train(*SMOKE, "trainer.max_epochs=2")[0] == 0 and read_epochs() == [0, 1]
    assert train("trainer.max_epochs=4")[0] == 0 and read_epochs() == [0, 1, 2, 3]
    assert json.loads((tmp_path / "summary.json").read_text())["epochs"] == 4
    assert train()[0] == 0 and read_epochs() == [0, 1, 2, 3], "it is a run of four epochs now"
    code, err = train("trainer.max_epochs=3")
    assert "holds a run of 4 epochs: set trainer.max_epochs=4 or more" in told(err, code)
    code, err = train("trainer.max_epochs=many")
    assert "max_epochs" in told(err, code)


def test_a_run_that_steps_bound_is_not_continued_by_epochs(tmp_path: Path) -> None:
    saved = OmegaConf.create({"trainer": {"max_epochs": None, "max_steps": 4}, "callbacks": {}})
    with pytest.raises(
        TrainingError, match=r"that steps or time bound, and not epochs: continue it with run="
    ):
        extend(saved, 3, tmp_path)


@pytest.mark.slow
def test_a_run_in_phases_is_not_continued_for_more_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("schedule=reconstruct", "callbacks.reconstruct.fractions=[0.5]", *SMOKE[1:3])
    quick = (f"run={tmp_path}", "callbacks.progress=null", "trainer.max_epochs=4", "data.batch_size=600")
    code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, *given, *quick)
    assert (code, err) == (0, "")
    given = (f"run={tmp_path}", "trainer.max_epochs=9")
    code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, *given)
    assert "in phases" in told(err, code) and f"init={tmp_path}" in err


def test_the_whole_traceback_is_there_for_the_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GlobalHydra.instance().clear()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["train", f"run={tmp_path}", "callbacks.growth.amount.ceiling=0.5"])
    with pytest.raises(Exception, match=r"ceiling=0\.5 cannot be"):
        run(elastic.experiments.train.main)


SUMMARY = '{"test/acc": 0.9, "params": 10, "params_dense": 20, "macs": 30, "wall_s": 1.5}'
DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "half of it": SUMMARY[: len(SUMMARY) // 2].encode(),
    "without an accuracy": SUMMARY.replace("test/acc", "val/acc").encode(),
    "an accuracy that is null": SUMMARY.replace("0.9", "null").encode(),
    "an accuracy that is a word": SUMMARY.replace("0.9", '"0.9"').encode(),
    "a size that is a word": SUMMARY.replace("10", '"ten"').encode(),
    "a list": f"[{SUMMARY}]".encode(),
    "no text": b"\xff\xfe{}",
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", list(DAMAGED))
def test_a_damaged_summary_is_named_and_nothing_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """One among others that are whole; without it they are compared."""
    for seed in range(3):
        (tmp_path / f"arm-seed{seed}").mkdir()
        (tmp_path / f"arm-seed{seed}" / "summary.json").write_text(SUMMARY)
    damaged = tmp_path / "arm-seed1" / "summary.json"
    damaged.write_bytes(DAMAGED[what])
    given = (f"runs={tmp_path}/arm-*", f"csv={tmp_path / 'all.csv'}", f"figure={tmp_path / 'all.png'}")
    code, out, err = command(elastic.experiments.compare.main, monkeypatch, capsys, *given)
    said = f"{damaged} is damaged: finish its run again, or leave it out of runs"
    assert told(err, code) == said and err.count("\n") == 1 and out == ""
    assert not list(tmp_path.glob("all.*"))
    damaged.unlink()
    code, out, err = command(elastic.experiments.compare.main, monkeypatch, capsys, *given)
    assert (code, err) == (0, "") and "90.00 ± 0.00" in out and len(list(tmp_path.glob("all.*"))) == 2


def test_an_error_without_words_is_still_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise OSError

    code, _, err = command(main, monkeypatch, capsys)
    assert "OSError" in told(err, code)


def test_an_error_of_ours_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command(main, monkeypatch, capsys)


# --- full disks and kills -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed",
            "another process of",
        ),
        ("DataLoader worker (pid 4) is killed by signal: Killed. ", "a process that reads batches has died"),
        ("Early stopping conditioned on metric `x` which is not available.\nUse another", "`x` which is not"),
    ],
)
def test_what_fails_in_training_and_is_no_fault_of_the_code_is_one_line(cause: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message) as caught, explain_faults() as setting_up:
        setting_up.has_begun, setting_up.folder = True, "there"
        raise RuntimeError(cause)
    assert str(caught.value).endswith(("run=there", "look at the callbacks"))
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="a fault of the code"), explain_faults() as setting_up:
        setting_up.has_begun = True
        raise RuntimeError("a fault of the code")


def test_a_process_that_dies_is_told_whatever_its_signal_has_interrupted() -> None:
    """`inspect` makes a TypeError of any error that comes while it looks at a function."""
    with pytest.raises(TrainingError, match="a process that reads batches"), explain_faults() as setting_up:
        setting_up.has_begun = True
        try:
            raise RuntimeError("DataLoader worker (pid 4) is killed by signal: Killed. ")
        except RuntimeError as error:
            raise TypeError("unsupported callable") from error


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """Writes above 4 kB fail from the end of the second epoch on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    litter = set(Path(tempfile.gettempdir()).iterdir())
    try:
        with pytest.raises(OSError, match="too large"):
            fit(tmp_path, *EXACT, "trainer.max_epochs=3", after=(Spy(on_train_epoch_end=fill),))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load(tmp_path / "last.ckpt")["epoch"] == 0
    left = {p.name for p in tmp_path.iterdir()}
    assert left <= {"last.ckpt", "timeline.jsonl", "metrics"}
    new = {p for p in set(Path(tempfile.gettempdir()).iterdir()) - litter if p.is_file()}
    assert not [p for p in new if p.stat().st_size >= 4096], "half a checkpoint is left"


def test_checkpoints_are_written_beside_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /tmp is a file system of its own, moving from there is copying, which can stop half-way."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    fit(tmp_path / "run", *EXACT, "trainer.max_epochs=2")
    assert load(tmp_path / "run" / "last.ckpt")["epoch"] == 1


KILLED = (
    *SMOKE,
    "trainer.max_epochs=30",
    "data.batch_size=64",
    "trigger=periodic",
    "trigger.every=4",
    "callbacks.growth.amount.factor=1.2",
    "callbacks.growth.until=0.9",
    "callbacks.gates.begin=0.0",
    "callbacks.gates.penalty=5e-3",
)


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [0.05, 0.31])
def test_a_run_killed_and_continued_is_the_whole_run(tmp_path: Path, wait_s: float) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert process(*KILLED, f"run={whole}")[0] == 0
    line = [sys.executable, "-m", "experiments.train", *KILLED, f"run={broken}"]
    running = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        deadline = time.monotonic() + 120
        while not (broken / "last.ckpt").exists() or load(broken / "last.ckpt")["epoch"] < 2:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(wait_s)
        running.send_signal(signal.SIGKILL)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == -signal.SIGKILL, "it had finished already"
    assert load(broken / "last.ckpt")["epoch"] < 29 and not (broken / "summary.json").exists()
    assert process(f"run={broken}")[0] == 0
    assert load_history(whole)["timeline"]
    assert_same_run(whole, broken)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, broken)]
    for summary in summaries:
        summary.pop("wall_s")
    assert summaries[0] == summaries[1]


@pytest.mark.slow
def test_a_full_disk_by_process(tmp_path: Path) -> None:
    """No file above 20 kB: the first checkpoint cannot be written."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code, err = process(*SMOKE, f"run={tmp_path / 'run'}", preexec_fn=limit)
    assert "last.ckpt cannot be used (File too large)" in told(err, code)
    assert not {"summary.json", "last.ckpt"} & {p.name for p in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("run=multirun/max_epochs=2-seed0", "run='multirun/max_epochs=2-seed0'"),
        ("init=o/ünï", "init='o/ünï'"),
        ("init=it's", "init='it\\'s'"),
        ("hydra.sweep.dir=a[1]&b", "hydra.sweep.dir='a[1]&b'"),
        ("init=[a,b]", "init=[a,b]"),
        ("init=a,b", "init=a,b"),
        ("run=${oc.env:HOME}/a", "run=${oc.env:HOME}/a"),
        ("model.name=x=y", "model.name=x=y"),
    ],
)
def test_folders_are_named_as_they_are_called(word: str, written: str) -> None:
    assert rewrite(word) == written


@pytest.mark.slow
def test_a_folder_with_an_equals_sign_is_trained_in_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, folder = elastic.experiments.train.main, tmp_path / "max_epochs=1"
    for _ in range(2):
        given = () if (folder / "summary.json").exists() else (*SMOKE, "trainer.max_epochs=2")
        code, _, err = command(main, monkeypatch, capsys, f"run={folder}", *given)
        assert code == 0, err
    (folder / "last.ckpt").unlink()
    before = (folder / "model.safetensors").read_bytes()
    code, _, err = command(main, monkeypatch, capsys, f"run={folder}")
    assert "holds a finished network and no last.ckpt to go on from" in told(err, code)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_sweep_without_its_flag_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, "sweep=demo")
    assert "sweep=demo is of several runs: add -m" in told(err, code)
