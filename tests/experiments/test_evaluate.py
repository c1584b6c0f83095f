"""A run measured again from its files gives what its summary says."""

import json
from pathlib import Path

import pytest

import elastic.experiments.evaluate
from elastic.errors import FileError
from elastic.experiments.evaluate import evaluate
from elastic.experiments.train import train
from tests.fitted import command
from tests.runs import TINY, configure

MEASURED = ("test/acc", "params", "params_dense", "macs", "macs_dynamic", "levels")
CHANGING = (
    *TINY,
    "experiment=smoke",
    "trainer.max_epochs=8",
    "data.batch_size=64",
    "trigger=periodic",
    "trigger.every=2",
    "callbacks.growth.until=0.9",
    "callbacks.gates.begin=0.0",
    "callbacks.gates.penalty=0.1",
    "callbacks.gates.end=0.6",
    "callbacks.gates.grace=0",
    "optimizer.lr=3e-2",
)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(configure(folder, *CHANGING), folder)
    return folder


def test_it_measures_what_the_summary_says(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["params"] < 0.9 * summary["params_dense"], "pruned, so that something could get lost"
    again = evaluate(finished)
    assert again == summary


def test_it_measures_and_does_not_copy(finished: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    summary = json.loads((finished / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | dict.fromkeys(MEASURED, -1)))
    assert evaluate(tmp_path) == summary


def test_it_ends_with_one_line_of_json(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    code, out, _ = command(elastic.experiments.evaluate.main, monkeypatch, capsys, f"run={finished}")
    assert code == 0
    assert json.loads(out.strip().splitlines()[-1]) == json.loads((finished / "summary.json").read_text())
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}, "it only looks"


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "summary.json"])
def test_a_run_that_is_not_finished_is_refused(finished: Path, tmp_path: Path, name: str) -> None:
    for other in {"config.yaml", "model.safetensors", "summary.json"} - {name}:
        (tmp_path / other).write_bytes((finished / other).read_bytes())
    with pytest.raises(FileError, match=f"{tmp_path / name} is missing"):
        evaluate(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("run=/nonexistent",), "/nonexistent"),
        ((), "name run=…"),
        (("runs=x",), "there is no option runs=x"),
        (("run=a", "levels=1"), "there is no option levels=1"),
        (("run=7",), "7"),
        (("run=",), "run="),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: tuple[str, ...], named: str
) -> None:
    code, out, err = command(elastic.experiments.evaluate.main, monkeypatch, capsys, *arguments)
    assert code == 1 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "summary.json"])
def test_a_damaged_file_is_named(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, name: str
) -> None:
    for other in ("config.yaml", "model.safetensors", "summary.json"):
        content = (finished / other).read_bytes()
        (tmp_path / other).write_bytes(content[: len(content) // 2] + b"\n}{[" if other == name else content)
    code, _, err = command(elastic.experiments.evaluate.main, monkeypatch, capsys, f"run={tmp_path}")
    assert code == 1 and err.strip().splitlines()[-1].startswith("error: ") and name in err
