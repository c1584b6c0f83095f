"""Sweeps: what their runs are called, that each is done once, and that none takes the others down."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf, open_dict

from elastic.errors import SweepError, TrainingError
from elastic.experiments.tools import sweep
from elastic.experiments.tools.folders import lock_folder, make_portable
from elastic.experiments.tools.sweep import (
    count_remaining,
    describe_progress,
    name_grid,
    name_run,
    read_objectives,
    run_in_sweep,
)
from tests.runs import CONF, TINY, configure


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("data=mnist,callbacks.gates.budget=2000,seed=1", "mnist-budget=2000-seed1"),
        ("schedule=[growth,gates],data=mnist", "growth+gates-mnist-seed0"),
        ("seed=3,model.channels=[4,6]", "channels=4+6-seed3"),
        ("schedule=static", "static-seed0"),
        ("", "run-seed0"),
        ("init=some/where/else", "some+where+else-seed0"),
    ],
)
def test_a_run_is_named_after_what_sets_it_apart(overrides: str, name: str) -> None:
    assert name_run(overrides) == name


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.sampled_from(["static", "[growth,gates]"]))
def test_names_are_folders_and_tell_runs_apart(channels: list[int], schedule: str) -> None:
    name = name_run(f"model.channels={channels},schedule={schedule},seed=0".replace(" ", ""))
    assert "/" not in name and name.endswith("-seed0")
    assert not set(name) & set("[]*?,'\" ")
    assert name != name_run(f"model.channels={[*channels, 1]},schedule={schedule},seed=0".replace(" ", ""))


def test_long_names_are_cut_and_still_tell_runs_apart() -> None:
    many = ",".join(f"callbacks.gates.option{i}=value{i}" for i in range(40))
    one, two = name_run(f"{many},callbacks.last=1,seed=7"), name_run(f"{many},callbacks.last=2,seed=7")
    assert one != two and len(one) < 200 and one.endswith("-seed7")


@pytest.mark.parametrize(("launcher", "plugin"), [("basic", ""), ("cores", "joblib"), ("slurm", "submitit")])
def test_the_demo_can_be_given_any_launcher(tmp_path: Path, launcher: str, plugin: str) -> None:
    if plugin:
        pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    assert configure(tmp_path, "sweep=demo", f"hydra/launcher={launcher}").trainer.max_epochs == 4


def test_a_run_that_another_process_is_at_is_left_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep that is started again while jobs of the first start are running: they have not failed."""

    def busy(cfg: Any, folder: Path) -> dict[str, Any]:
        with lock_folder(folder), lock_folder(folder):
            raise AssertionError

    assert run_in_sweep(configure(tmp_path, *TINY), tmp_path / "run", busy) == {}
    assert "another process trains in" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_what_no_run_of_the_sweep_can_do_ends_it(tmp_path: Path) -> None:
    def refuse(cfg: Any, folder: Path) -> dict[str, Any]:
        raise SweepError("none")

    with pytest.raises(SweepError):
        run_in_sweep(run_of(tmp_path), tmp_path, refuse)


def run_of(folder: Path, *overrides: str) -> Any:
    return configure(folder, *TINY, *overrides)


def never(cfg: Any, folder: Path) -> dict[str, Any]:
    raise AssertionError("it was run again")


def test_a_run_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    cfg = run_of(tmp_path)
    OmegaConf.save(make_portable(cfg), tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text('{"val/acc": 0.5}')
    assert run_in_sweep(cfg, tmp_path, never) == {"val/acc": 0.5}


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    cfg = run_of(tmp_path)
    OmegaConf.save(make_portable(cfg), tmp_path / "config.yaml")
    (tmp_path / "failed.json").write_text("{}")
    assert run_in_sweep(cfg, tmp_path, lambda *_: {"val/acc": 0.7}) == {"val/acc": 0.7}
    assert not (tmp_path / "failed.json").exists()


@pytest.mark.parametrize("text", ["", "name: digits\nseed: 0\n", "{"])
@pytest.mark.parametrize("done", [True, False])
def test_a_run_whose_configuration_is_damaged_is_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, done: bool
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    if done:
        (tmp_path / "summary.json").write_text('{"val/acc": 0.5}')
    assert run_in_sweep(run_of(tmp_path), tmp_path, lambda *_: {"val/acc": 0.7}) == {"val/acc": 0.7}
    assert "config.yaml" in capsys.readouterr().out
    assert not (tmp_path / "failed.json").exists() and not (tmp_path / "config.yaml").exists()


def test_another_run_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    OmegaConf.save(make_portable(run_of(tmp_path, "seed=4")), tmp_path / "config.yaml")
    assert run_in_sweep(run_of(tmp_path), tmp_path, never) == {}
    assert "holds another run" in json.loads((tmp_path / "failed.json").read_text())["error"]


@pytest.mark.parametrize(
    "error", [TrainingError("a line\nand another"), ValueError(), MemoryError("too much")]
)
def test_a_run_that_fails_says_why_and_lets_the_others_go_on(tmp_path: Path, error: Exception) -> None:
    def fail(cfg: Any, folder: Path) -> dict[str, Any]:
        raise error

    assert run_in_sweep(run_of(tmp_path), tmp_path, fail) == {}
    noted = json.loads((tmp_path / "failed.json").read_text())
    assert noted["kind"] == type(error).__name__ and "\n" not in noted["error"] and noted["error"]


def test_a_search_goes_by_what_it_asked_for() -> None:
    summary = {"val/acc": 0.9, "params": 1200}
    assert read_objectives(summary, ["val/acc"]) == 0.9
    assert read_objectives(summary, ["val/acc", "params"]) == (0.9, 1200.0)
    assert read_objectives({"val/acc": None}, ["val/acc"]) != 0.9
    failed = read_objectives({}, ["val/acc", "params"])
    assert isinstance(failed, tuple) and all(value != value for value in failed)


def test_progress_counts_the_folders(tmp_path: Path) -> None:
    for name, files in {
        "a": ["config.yaml", "summary.json"],
        "b": ["config.yaml"],
        "c": ["failed.json"],
        "d": ["config.yaml", "failed.json"],
        "e": ["config.yaml", "failed.json"],  # before the sweep was started again
        "notes": [],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
    (tmp_path / "multirun.yaml").write_text("")
    os.utime(tmp_path / "e" / "failed.json", (0, 0))
    os.utime(tmp_path / "d" / "failed.json", (5, 5))  # the clock has jumped back meanwhile
    plan = {"runs": 7, "since": time.time() - 600, "behind": 1, "stale": {"e": 0}, "names": []}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    assert describe_progress(tmp_path) == f"{tmp_path}: 1 of 7 done, 1 running, 2 failed; about 20 min left"
    (tmp_path / "sweep.json").write_text(json.dumps({**plan, "runs": 3}))
    assert describe_progress(tmp_path) == f"{tmp_path}: 1 of 3 done, 1 running, 2 failed"
    of_this = {"runs": 3, "behind": 0, "names": ["b", "c", "new"]}  # another sweep has left the rest
    (tmp_path / "sweep.json").write_text(json.dumps(plan | of_this))
    assert describe_progress(tmp_path) == f"{tmp_path}: 0 of 3 done, 1 running, 1 failed; about 20 min left"


@given(
    st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)),
    st.dictionaries(st.sampled_from("bcd"), st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)),
)
def test_a_sweep_knows_how_many_runs_it_has(of_file: dict[str, Any], of_command: dict[str, Any]) -> None:
    params, given_ = ({k: ",".join(map(str, v)) for k, v in d.items()} for d in (of_file, of_command))
    line = [f"{key}={value}" for key, value in given_.items()]
    whole = OverridesParser.create().parse_overrides([*(f"{k}={v}" for k, v in params.items()), *line])
    (jobs,) = BasicSweeper.split_arguments(whole, None)
    assert len(set(name_grid(params, line))) == len(jobs)


def test_a_sweep_knows_what_hydra_calls_its_runs() -> None:
    rest = ("+callbacks.checkpoint.verbose=true", "~trigger")
    names = name_grid({"optimizer.lr": "1e-3,0.01"}, ["schedule=static,[growth,gates]", "seed=1,2", *rest])
    composed = compose_sweep("optimizer.lr=0.01", "schedule=[growth,gates]", "seed=2", *rest)
    HydraConfig.instance().set_config(composed)
    assert composed.hydra.sweep.subdir in names and len(set(names)) == 8


@pytest.mark.parametrize(
    ("params", "options", "text"),
    [
        ({"schedule": "gates,joint"}, (), "0 of 2 done"),
        ({"schedule": "static,joint", "seed": "0,0"}, (), "1 of 2 done"),  # two folders for four jobs
        ({"schedule": "gates,joint"}, ("hydra.sweep.subdir=x${seed}",), "1 of 2 done"),  # nobody knows whose
    ],
)
def test_runs_of_an_earlier_sweep_in_the_folder_are_not_counted(
    tmp_path: Path, params: dict[str, str], options: tuple[str, ...], text: str
) -> None:
    (tmp_path / "static-seed0").mkdir()
    for name in ("config.yaml", "summary.json"):
        (tmp_path / "static-seed0" / name).write_text("{}")
    config = compose_sweep(f"hydra.sweep.dir={tmp_path}", *options)
    with open_dict(config):
        config.hydra.sweeper.params = params
    sweep.Sweep().on_multirun_start(config)
    assert describe_progress(tmp_path).startswith(f"{tmp_path}: {text}")


def test_a_search_that_was_killed_goes_on_with_what_it_was_doing(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = f"sqlite:///{tmp_path}/study.db"
    sweeper = OmegaConf.create(
        {"study_name": "s", "storage": url, "direction": ["maximize", "minimize"], "n_trials": 5}
    )
    assert count_remaining(sweeper) == 5
    storage = optuna.storages.RDBStorage(url)
    study = optuna.load_study(study_name="s", storage=storage)
    space = {"x": optuna.distributions.FloatDistribution(0, 1)}
    study.tell(study.ask(space), [0.5, 100])
    study.tell(study.ask(space), state=optuna.trial.TrialState.FAIL)
    killed = study.ask(space)
    assert count_remaining(sweeper) == 3, "two are done, one of them failed"
    assert count_remaining(sweeper) == 3, "and looking changes nothing"
    again = study.ask(space)
    assert again.params == killed.params
    assert count_remaining(sweeper) == 3, "killed once more"
    twice = study.ask(space)
    assert twice.params == killed.params
    study.tell(twice, [0.6, 90])
    assert count_remaining(sweeper) == 2
    storage.engine.dispose()


def test_the_sweepers_configuration_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "count_remaining", lambda sweeper: sweeper.n_trials - 3)
    config = compose_sweep(f"hydra.sweep.dir={tmp_path / 'new'}")
    with open_dict(config):
        config.hydra.sweeper = {"storage": "x", "n_trials": 7}
    sweep.Sweep().on_multirun_start(config)
    assert config.hydra.sweeper.n_trials == 4 and (tmp_path / "new").is_dir()


def compose_sweep(*overrides: str) -> DictConfig:
    """Compose what Hydra gives to callbacks when a sweep begins: no run has been composed by then."""
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


def test_all_runs_of_a_sweep_lie_in_the_folder_of_its_first_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose_sweep()
    sweep.Sweep().on_multirun_start(config)
    assert Path("multirun/digits-convnet").is_dir()
    again = compose_sweep("data=shapes", *config.hydra.overrides.hydra)
    assert again.hydra.sweep.dir == "multirun/digits-convnet"
