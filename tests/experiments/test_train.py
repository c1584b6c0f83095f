"""A run from the command line: what it leaves in its folder, how it is continued, several at once."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

import elastic.experiments.train
from elastic.callbacks import GrowOnSaturation
from elastic.errors import DataError
from elastic.experiments.evaluate import evaluate
from elastic.experiments.tools.figure import draw_history
from elastic.experiments.tools.parts import make_callbacks
from elastic.experiments.train import build, train
from tests.fitted import command
from tests.resuming import assert_same
from tests.runs import TINY, configure, load

ROOT = Path(__file__).parents[2]
SMOKE = (*TINY, "experiment=smoke", "trainer.max_epochs=2")
CHANGING = (
    *SMOKE,
    "trainer.max_epochs=4",
    "data.batch_size=128",
    "+trainer.limit_train_batches=5",
    "trigger=periodic",
    "trigger.every=2",
    "callbacks.gates.begin=0.0",
    "callbacks.gates.penalty=1e-2",
)
FILES = {
    *(".lock", "config.yaml", "history.jsonl", "history.png", "last.ckpt", "metrics"),
    *("model.safetensors", "summary.json", "timeline.jsonl", "SHA256SUMS"),
}
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def by_command(patch: Patch, capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    return command(elastic.experiments.train.main, patch, capsys, *arguments)


def test_two_processes_do_not_train_in_one_folder(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    given = (*CHANGING, f"run={tmp_path}")
    with FileLock(tmp_path / ".lock"):
        code, _, err = by_command(monkeypatch, capsys, *given)
    assert code == 1 and {p.name for p in tmp_path.iterdir()} == {".lock"}
    expected = f"error: another process trains in {tmp_path}: wait until it has ended, or stop it"
    assert err.splitlines() == [expected]


def test_a_run_leaves_its_files_and_nothing_else(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(elastic.experiments.train, "draw_history", draw_history)
    code, out, err = by_command(monkeypatch, capsys, *CHANGING, f"run={tmp_path}")
    assert code == 0, err
    assert {p.name for p in tmp_path.iterdir()} == FILES
    assert (tmp_path / "metrics" / "version_0" / "metrics.csv").stat().st_size > 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert f"{summary['test/acc']:.2%}" in out and f"{summary['params']:,}" in out
    assert str(tmp_path) in out
    held = load(tmp_path / "last.ckpt")
    assert (held["epoch"], held["state_dict"]["structure._extra_state"]["timeline"]) == (
        3,
        [json.loads(line) for line in (tmp_path / "timeline.jsonl").read_text().splitlines()],
    )


def test_the_configuration_that_is_kept_gives_the_same_run_again(tmp_path: Path) -> None:
    """By itself, in any folder: it is resolved but for what depends on the machine."""
    cfg = configure(tmp_path / "one", *CHANGING)
    first = train(cfg, tmp_path / "one")
    again: Any = OmegaConf.load(tmp_path / "one" / "config.yaml")
    (tmp_path / "two").mkdir()
    again.run = str(tmp_path / "two")
    second = train(again, tmp_path / "two")
    assert {**first, "wall_s": 0} == {**second, "wall_s": 0}
    text = (tmp_path / "one" / "config.yaml").read_text()
    assert str(tmp_path) not in text
    assert set(re.findall(r"\$\{([^},]+)", text)) <= {"run", "oc.env:ELASTIC_DATA"}
    one, two = (load(tmp_path / name / "last.ckpt") for name in ("one", "two"))
    assert_same(one["state_dict"], two["state_dict"])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_run_in_another_precision_is_saved_and_measured_in_32_bits(tmp_path: Path, precision: str) -> None:
    options = ("experiment=smoke", "data.batch_size=512", f"trainer.precision={precision}")
    summary = train(configure(tmp_path, *TINY, *options), tmp_path)
    assert 0 < summary["test/acc"] <= 1
    tensors = load_file(tmp_path / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}


def test_the_network_and_the_data_follow_from_the_seed(tmp_path: Path) -> None:
    nets = [build(configure(tmp_path, f"seed={seed}"))[0].state_dict() for seed in (0, 0, 1)]
    assert_same(nets[0], nets[1])
    assert not torch.equal(nets[0]["net.0.weight"], nets[2]["net.0.weight"])
    assert build(configure(tmp_path, "seed=3"))[1].seed == 3


def test_what_was_measured_is_the_last_epochs_network(tmp_path: Path) -> None:
    cfg = configure(tmp_path, *CHANGING)
    summary = train(cfg, tmp_path)
    module, data = build(cfg)
    from elastic.pruning import gates

    gates.attach_gates(module.net, module.structure.widths, "weight")
    module.load_state_dict(load(tmp_path / "last.ckpt")["state_dict"])
    data.prepare_data()
    data.setup("test")
    x_BCHW, y_B = data.test_set.__getitems__(list(range(len(data.test_set))))  # type: ignore[union-attr,arg-type]
    with torch.no_grad():
        logits_BK = module.eval()(data.normalise(x_BCHW.float() / 255))
    assert summary["test/acc"] == pytest.approx(
        (logits_BK.argmax(1) == y_B).float().mean().item(), abs=1.5 / 360
    )


def test_the_test_split_is_looked_at_once_at_the_end(tmp_path: Path, monkeypatch: Patch) -> None:
    asked: list[str] = []
    fits = L.Trainer.fit
    monkeypatch.setattr(L.Trainer, "fit", lambda *a, **k: (fits(*a, **k), asked.append("fitted"))[0])
    loader = elastic.experiments.train.ImageData.test_dataloader
    monkeypatch.setattr(
        elastic.experiments.train.ImageData,
        "test_dataloader",
        lambda self: (asked.append("test"), loader(self))[1],
    )
    train(configure(tmp_path, *SMOKE), tmp_path)
    assert asked == ["fitted", "test"]


# --- continuing ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(configure(folder, *CHANGING, "seed=7"), folder)
    return folder


@pytest.fixture
def finished(once: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(once, tmp_path / "run"))


def test_a_finished_run_named_again_is_measured_again(
    finished: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """With its own settings, whatever the defaults are now."""
    names = ("config.yaml", "last.ckpt", "model.safetensors", "timeline.jsonl")
    before = {name: (finished / name).read_bytes() for name in names}
    first = json.loads((finished / "summary.json").read_text())
    code, _, err = by_command(monkeypatch, capsys, f"run={finished}")
    assert code == 0, err
    for name in names:
        assert (finished / name).read_bytes() == before[name], name
    second = json.loads((finished / "summary.json").read_text())
    assert {**first, "wall_s": 0} == {**second, "wall_s": 0} and second["seed"] == 7
    assert second["wall_s"] >= first["wall_s"], "the time of the run, not of the last start"


def test_a_run_that_steps_have_ended_has_as_many_epochs_whenever_it_is_measured(tmp_path: Path) -> None:
    """Two, the second one in part."""
    short = ("+trainer.limit_train_batches=2", "+trainer.max_steps=3", "trainer.max_epochs=null")
    cfg = configure(tmp_path, *SMOKE, *short, "schedule=static", "+trainer.limit_test_batches=1")
    assert [train(cfg, tmp_path)["epochs"] for _ in range(2)] == [2, 2]


@pytest.mark.slow
def test_a_run_that_was_stopped_early_stays_so_unless_more_epochs_are_asked_for(tmp_path: Path) -> None:
    """Patience is over in the second epoch, and in each later one."""
    stop = (
        "_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, min_delta: 99, patience: 1"
    )
    few = ("+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1")
    options = (*SMOKE, *few, f"+callbacks.stop={{{stop}}}", "schedule=static", "lr_scheduler=constant")
    cfg = configure(tmp_path, *options)
    assert [train(cfg, tmp_path)["epochs"] for _ in range(2)] == [2, 2]
    assert load(tmp_path / "last.ckpt")["epoch"] == 1
    cfg.trainer.max_epochs = 5
    assert [train(cfg, tmp_path)["epochs"] for _ in range(2)] == [3, 3]


def test_a_run_killed_in_its_first_epoch_is_begun_anew_by_its_folder_alone(
    finished: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """There is no checkpoint yet, but its configuration is."""
    for path in finished.iterdir():
        if path.is_file() and path.name != "config.yaml":
            path.unlink()
    seen: list[Any] = []
    monkeypatch.setattr(elastic.experiments.train, "train", lambda cfg, _: seen.append(cfg) or {"val/acc": 0})
    assert by_command(monkeypatch, capsys, f"run={finished}")[0] == 0
    assert by_command(monkeypatch, capsys, f"run={finished}", "seed=3")[0] == 0
    assert [(cfg.seed, cfg.name) for cfg in seen] == [(7, "smoke"), (3, "digits-convnet")]


def test_a_continuation_that_fails_leaves_the_run_as_it_was(
    finished: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Its configuration, too: `run=<folder>` alone must work again."""
    before = (finished / "config.yaml").read_text()

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no more")

    monkeypatch.setattr(L.Trainer, "fit", fails)
    assert by_command(monkeypatch, capsys, f"run={finished}")[0] == 1
    assert (finished / "config.yaml").read_text() == before


def test_a_checkpoint_without_its_configuration_is_named(
    finished: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    (finished / "config.yaml").unlink()
    code, _, err = by_command(monkeypatch, capsys, f"run={finished}")
    assert code == 1 and "config.yaml" in err.strip().splitlines()[-1]


@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_checkpoint_that_is_damaged_is_named(
    finished: Path, monkeypatch: Patch, capsys: Capture, kept: float
) -> None:
    whole = (finished / "last.ckpt").read_bytes()
    (finished / "last.ckpt").write_bytes(whole[: int(kept * len(whole))])
    code, _, err = by_command(monkeypatch, capsys, f"run={finished}")
    assert code == 1 and "last.ckpt" in err.strip().splitlines()[-1]


# --- several ------------------------------------------------------------------------------------------------


def multirun(folder: Path, *arguments: str) -> None:
    line = [sys.executable, "-m", "experiments.train", "-m", *SMOKE, *arguments, f"hydra.sweep.dir={folder}"]
    subprocess.run(
        line, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True
    )


@pytest.mark.slow
def test_a_multirun_makes_a_folder_for_each_run(tmp_path: Path) -> None:
    multirun(tmp_path, "seed=0,1")
    for seed in (0, 1):
        (folder,) = tmp_path.glob(f"*-seed{seed}")
        assert {p.name for p in folder.iterdir()} >= FILES
        assert json.loads((folder / "summary.json").read_text())["seed"] == seed
        alone = tmp_path / f"alone{seed}"
        train(configure(alone, *SMOKE, f"seed={seed}"), alone)
        names = ("model.safetensors", "timeline.jsonl")
        for name in names:
            assert (folder / name).read_bytes() == (alone / name).read_bytes(), "it depends on its neighbours"


@pytest.mark.slow
def test_a_multirun_over_schedules(tmp_path: Path) -> None:
    multirun(tmp_path, "schedule=static,[growth,gates]")
    found = [json.loads(path.read_text())["schedule"] for path in tmp_path.glob("*/summary.json")]
    assert sorted(found) == ["growth+gates", "static"]


# --- other networks, other data -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_residual_network_grows_and_prunes(tmp_path: Path) -> None:
    options = ("model=resnet20", "model.width=4", "callbacks.gates.grain=kernel", "trainer.max_epochs=3")
    every = (
        "trigger=periodic",
        "trigger.every=1",
        "callbacks.growth.until=0.9",
        "callbacks.growth.amount.factor=1.1",
    )
    summary = train(configure(tmp_path, *SMOKE, *options, *every, "callbacks.gates.begin=0.0"), tmp_path)
    sizes = load(tmp_path / "last.ckpt")["state_dict"]["structure._extra_state"]
    assert all(sizes["sizes"][name] > size for name, size in sizes["start_sizes"].items())
    assert summary["params"] <= summary["params_dense"]


def test_any_stock_model_is_trained(tmp_path: Path) -> None:
    """Not one of ours, and with none of our arguments: torchvision's, through a lambda's worth of YAML."""
    cfg = configure(tmp_path, *SMOKE, "trainer.max_epochs=1", "data.batch_size=64")
    cfg.model = {"_target_": "tests.experiments.test_train.squeezenet"}
    summary = train(cfg, tmp_path)
    assert summary["params"] > 5_000


def squeezenet(in_channels: int, classes: int) -> torch.nn.Module:
    from torchvision.models.squeezenet import Fire

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(in_channels, 16, 3, padding=1),
        torch.nn.ReLU(),
        Fire(16, 8, 32, 32),
        Fire(64, 8, 32, 32),
        torch.nn.Conv2d(64, classes, 1),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )


def test_a_folder_of_images_is_trained_on(tmp_path: Path) -> None:
    for part, n in (("train", 12), ("test", 4)):
        for k, name in enumerate(("red", "green")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(n):
                colour = (200 - 10 * i, 0, 0) if k == 0 else (0, 200 - 10 * i, 0)
                Image.new("RGB", (20, 20), colour).save(tmp_path / "data" / part / name / f"{i}.png")
    given = (f"data.root={tmp_path / 'data'}", "data.size=16", "data.batch_size=8", "data.workers=0")
    flips = ("~data.augment", "data.val_fraction=0.2")
    folder = tmp_path / "run"
    cfg = configure(folder, *SMOKE, "data=folder", *given, *flips, "trainer.max_epochs=3")
    summary = train(cfg, folder)
    assert summary["data"] == "folder" and 0 <= summary["test/acc"] <= 1
    for part in ("train", "test"):  # the second class becomes the first one
        (tmp_path / "data" / part / "red").rename(tmp_path / "data" / part / "crimson")
    said = (
        r"has other classes \(crimson, green\) than the network was trained on \(green, red\): set data\.root"
    )
    for use in (lambda: evaluate(folder), lambda: train(cfg, folder)):
        with pytest.raises(DataError, match=said):
            use()
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_what_callbacks_are_given_is_plain(tmp_path: Path) -> None:
    """A trigger's attributes are in checkpoints, which hold nothing that only OmegaConf could read."""
    own = ("+trigger.levels=[0.5,0.7]", "trigger._target_=types.SimpleNamespace")
    callbacks = make_callbacks(configure(tmp_path, *own)).values()
    (growth,) = (callback for callback in callbacks if isinstance(callback, GrowOnSaturation))
    assert type(growth.trigger.levels) is list  # type: ignore[attr-defined]


def test_running_leaves_the_configuration_given_alone(tmp_path: Path) -> None:
    cfg = configure(tmp_path, *SMOKE)
    before = copy.deepcopy(cfg)
    train(cfg, tmp_path)
    assert cfg == before
