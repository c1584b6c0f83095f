"""A run logged to W&B without an account, read back: what every panel of the dashboard shows is there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic.errors import OptionError
from elastic.experiments import dashboard
from elastic.experiments.train import train
from tests.runs import TINY, configure, without_account

CHANGING = (
    *(*TINY, "experiment=smoke", "logger=wandb", "trainer.max_epochs=4"),
    *("trigger=periodic", "trigger.every=2", "callbacks.growth.until=0.9", "callbacks.gates.begin=0.0"),
)
SWITCHED = (*TINY, "experiment=smoke", "logger=wandb", "schedule=dynamic", "callbacks.dynamic.gain=[0.1,1.0]")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Whatever W&B keeps, it keeps here; and there is no account."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        without_account(patch, folder)
        yield folder


def records(folder: Path) -> list[dict[str, Any]]:
    """All that a run has recorded, by W&B's own reader."""
    (recorded,) = folder.glob("wandb/offline-run-*")
    wandb = Path(sys.executable).parent / "wandb"
    said = subprocess.run(
        [str(wandb), "leet", "inspect", "--json", str(recorded)], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in said.stdout.splitlines() if line.startswith("{")]


def keys(found: list[dict[str, Any]], kind: str) -> set[str]:
    held = {name for record in found if record["type"] == kind for name in flat(record[kind])}
    return held | {name.partition("._")[0] for name in held}  # media are stored under several keys


def flat(held: Any) -> set[str]:
    """All keys and strings in a record, however deep."""
    if isinstance(held, dict):
        return set(held) | {name for value in held.values() for name in flat(value)}
    if isinstance(held, list):
        return {name for value in held for name in flat(value)}
    return {held} if isinstance(held, str) else set()


@pytest.fixture(scope="module")
def changing(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("changing")
    train(configure(folder, *CHANGING), folder)
    return folder, records(folder)


@pytest.fixture(scope="module")
def switched(home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("switched")
    train(configure(folder, *SWITCHED), folder)
    return records(folder)


@pytest.mark.slow
def test_every_panel_has_its_data(
    changing: tuple[Path, list[dict[str, Any]]], switched: list[dict[str, Any]]
) -> None:
    held = keys(changing[1], "history") | keys(switched, "history")
    lines = {key for section in dashboard.LINES.values() for panel in section.values() for key in panel}
    assert lines | {key for media in dashboard.MEDIA.values() for key in media} <= held
    assert {*dashboard.HISTOGRAMS, "timeline", "sets"} <= held
    assert set(dashboard.FRONT) <= keys(changing[1], "summary")


def test_the_configuration_is_complete(changing: tuple[Path, list[dict[str, Any]]]) -> None:
    held = keys(changing[1], "config")
    assert {"callbacks", "trainer", "optimizer", "data", "model", "seed", "label_smoothing"} <= held


def test_the_network_is_an_artifact(changing: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = changing
    held = keys(found, "artifact")
    assert {f"smoke-{folder.name}", "model", "latest", "seed0"} <= held
    assert {"model.safetensors", "summary.json", "timeline.jsonl", "config.yaml", "history.jsonl"} <= held


def test_runs_are_named_and_tagged(changing: tuple[Path, list[dict[str, Any]]]) -> None:
    (run,) = [record["run"] for record in changing[1] if record["type"] == "run"]
    held = flat(run)
    assert {"elastic-cnn", "smoke", "smoke-seed0", "digits", "convnet"} <= held


def test_nothing_is_written_elsewhere(
    changing: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    assert wandb.run is None, "the next run of a sweep would go on in it"
    assert not Path("wandb").exists() or (Path("wandb").stat().st_mtime < changing[0].stat().st_mtime)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its library's own
def test_the_dashboard_is_made_without_an_account(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setattr("sys.argv", ["dashboard", "print=true"])
    dashboard.main()
    held = flat(json.loads(capsys.readouterr().out))
    lines = {key for section in dashboard.LINES.values() for panel in section.values() for key in panel}
    assert lines | set(dashboard.HISTOGRAMS) | set(dashboard.TABLES) <= held
    monkeypatch.setattr("sys.argv", ["dashboard"])
    with pytest.raises(OptionError, match=r"entity=.*print=true"):
        dashboard.main()
