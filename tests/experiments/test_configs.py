"""Every file of the configuration composes, everything it names can be made, every experiment runs."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn
from torchvision import datasets

import elastic.experiments.train
from elastic.callbacks import Census, ElasticProgress, GrowOnSaturation, PruneByGates
from elastic.data import ImageData
from elastic.experiments.train import train
from elastic.growth.amount import Growth
from elastic.growth.triggers import Periodic, Plateau
from tests.runs import CONF, configure, load

QUICK = (
    *("callbacks.progress=null", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1"),
    *("trainer.max_epochs=1", "trainer.precision=32-true"),
)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as long as the run, and has its own tests."""
    monkeypatch.setattr(elastic.experiments.train, "draw_history", lambda *_: None)


def files(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


HYDRAS = "hydra"  # its own groups, launchers say, which its own defaults list names
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != HYDRAS)
OPTIONS = [(group, name) for group in GROUPS for name in files(group)]


def targets(node: Any) -> list[str]:
    """Every `_target_` in a configuration, however deep."""
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [t for value in node.values() for t in targets(value)]
    return [t for value in node for t in targets(value)] if isinstance(node, list) else []


def test_the_groups_are_those_of_the_defaults_list() -> None:
    """A folder that the list does not name could never be chosen."""
    defaults: Any = OmegaConf.load(CONF / "config.yaml").defaults
    named = {next(iter(entry)) for entry in defaults if isinstance(entry, DictConfig)}
    assert set(GROUPS) <= {str(name).split()[-1].strip("/") for name in named}


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes_with_the_defaults(tmp_path: Path, group: str, name: str) -> None:
    """And every class or function it names can be imported."""
    value = f"[{name}]" if group == "schedule" else name
    cfg = configure(tmp_path, f"{group}={value}")
    found = targets(OmegaConf.to_container(cfg))
    assert len(found) > 8
    for target in found:
        owner, _, attribute = target.rpartition(".")
        resolved = instantiate({"_target_": "hydra.utils.get_object", "path": target})
        assert callable(resolved), f"{attribute} of {owner}"


@pytest.mark.parametrize("name", files("model"))
def test_every_model_can_be_made(tmp_path: Path, name: str) -> None:
    net = instantiate(configure(tmp_path, f"model={name}").model, in_channels=3, classes=7)
    assert isinstance(net, nn.Module) and net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", [name for name in files("model") if name != "narrow"])
def test_every_model_can_be_narrow(tmp_path: Path, name: str) -> None:
    given = ("model=narrow", f"model@model.model={name}", "model.fraction=0.5")
    whole, narrow = (
        instantiate(configure(tmp_path, *options).model, in_channels=3, classes=7)
        for options in ([f"model={name}"], given)
    )
    assert sum(p.numel() for p in narrow.parameters()) < 0.6 * sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("name", files("optimizer"))
def test_every_optimizer_can_be_made(tmp_path: Path, name: str) -> None:
    cfg = configure(tmp_path, f"optimizer={name}").optimizer
    optimizer = instantiate(cfg.optimizer)([nn.Parameter(torch.zeros(2))])
    scheduler = instantiate(cfg.scheduler)(optimizer, total_steps=20)
    rates = []
    for step in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 19:
            scheduler.step()
    assert max(rates) == pytest.approx(cfg.optimizer.lr) and rates[-1] < 0.01 * max(rates)


@pytest.mark.parametrize("name", files("data"))
def test_every_data_set_can_be_named_without_being_there(tmp_path: Path, name: str) -> None:
    """Making it reads nothing; digits need no download at all."""
    embedded = name in ("digits", "shapes")
    root = () if embedded else (f"data.root={tmp_path / 'nothing'}", "data.download=false")
    if name == "folder":  # its classes are its folders
        root = root[:1]
        for part in ("train", "test"):
            (tmp_path / "nothing" / part / "one").mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / "nothing" / part / "one" / "1.png")
    data = instantiate(configure(tmp_path, f"data={name}", *root).data)
    assert isinstance(data, ImageData) and len(data.mean) == len(data.std) == data.shape[0]
    assert data.classes in (1, 4, 10, 100)


@pytest.mark.parametrize(
    ("name", "kind"), [("plateau", Plateau), ("impatient", Plateau), ("periodic", Periodic)]
)
def test_every_trigger_can_be_made(tmp_path: Path, name: str, kind: type) -> None:
    cfg = configure(tmp_path, "schedule=[growth]", f"trigger={name}", "experiment=smoke")
    grow = instantiate(cfg.callbacks.growth)
    assert isinstance(grow, GrowOnSaturation) and isinstance(grow.trigger, kind)
    assert isinstance(grow.growth, Growth)
    assert set(files("trigger")) == {"plateau", "impatient", "periodic"}


def test_the_callbacks_can_be_made(tmp_path: Path) -> None:
    made = [type(instantiate(c)) for c in configure(tmp_path).callbacks.values()]
    assert {Census, ElasticProgress, GrowOnSaturation, PruneByGates} <= set(made)


def test_loggers_write_into_the_runs_folder(tmp_path: Path) -> None:
    logger = instantiate(configure(tmp_path).logger)
    assert isinstance(logger, CSVLogger) and Path(logger.log_dir).parent == tmp_path / "metrics"


# --- runs ---------------------------------------------------------------------------------------------------


SCHEDULES = {
    "static": "static",
    "[growth]": "grow",
    "[gates]": "prune",
    "[growth,gates]": "growth+gates",
    "[gates,growth]": "growth+gates",
    "[growth,gates,ema]": "growth+gates+ema",
    "[growth,magnitude]": "grow+magnitude",
}


@pytest.mark.parametrize("experiment", ["digits", "smoke"])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_every_schedule_runs(tmp_path: Path, schedule: str, experiment: str) -> None:
    budget = ["callbacks.magnitude.budget=900"] if "magnitude" in schedule else []
    given = (*QUICK, f"schedule={schedule}", f"experiment={experiment}", *budget)
    summary = train(configure(tmp_path, *given), tmp_path)
    assert summary["schedule"] == SCHEDULES[schedule]
    gated = any("score" in name for name in load(tmp_path / "last.ckpt")["state_dict"])
    assert gated == ("gates" in schedule or "magnitude" in schedule)


class SmallCIFAR10(datasets.CIFAR10):
    """Generated batches have no checksums that anyone knows."""

    train_list = [[name, None] for name, _ in datasets.CIFAR10.train_list]
    test_list = [[name, None] for name, _ in datasets.CIFAR10.test_list]
    meta = {**datasets.CIFAR10.meta, "md5": None}


def generated(data: str, root: Path) -> tuple[str, ...]:
    """A few random images in the layout of a set, and the overrides that use them."""
    random = np.random.default_rng(0)
    if data in ("digits", "shapes"):
        return ("data.batch_size=64",)
    if data == "folder":
        for part in ("train", "test"):
            for name in ("one", "two"):
                folder = root / part / name
                folder.mkdir(parents=True)
                for i in range(20):
                    pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        return (f"data.root={root}", "data.batch_size=9", "data.workers=0")
    few = (f"data.root={root}", "data.download=false", "data.batch_size=9")
    if data in ("mnist", "fashion_mnist"):
        raw = root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[data] / "raw"
        raw.mkdir(parents=True)
        for part, n in (("train", 60), ("t10k", 20)):
            for kind, array in (
                ("images", random.integers(0, 256, (n, 28, 28))),
                ("labels", np.arange(n) % 10),
            ):
                header = bytes([0, 0, 8, array.ndim]) + b"".join(d.to_bytes(4, "big") for d in array.shape)
                path = raw / f"{part}-{kind}-idx{array.ndim}-ubyte"
                path.write_bytes(header + array.astype(np.uint8).tobytes())
        return few
    if data == "cifar10":
        folder = root / SmallCIFAR10.base_folder
        folder.mkdir(parents=True)
        for name, _ in (*SmallCIFAR10.train_list, *SmallCIFAR10.test_list):
            images = random.integers(0, 256, (20, 3072), np.uint8)
            (folder / str(name)).write_bytes(pickle.dumps({"data": images, "labels": [*range(10)] * 2}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"abcdefghij"]}))
        return (*few, "data.dataset.path=tests.experiments.test_configs.SmallCIFAR10")
    if data == "imagenette":
        for part, n in (("train", 4), ("val", 1)):
            for wnid in datasets.Imagenette._WNID_TO_CLASS:
                folder = root / "imagenette2-160" / part / wnid
                folder.mkdir(parents=True)
                for i in range(n):
                    pixels = random.integers(0, 256, (160, 180, 3), np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.JPEG")
        return (*few, "data.workers=0")
    pytest.skip(f"no generator for {data}: add one")


def survives(folder: Path, experiment: str, *options: str) -> dict[str, Any]:
    summary = train(configure(folder, *QUICK, f"experiment={experiment}", *options), folder)
    assert summary["experiment"] == json.loads((folder / "summary.json").read_text())["experiment"]
    assert np.isfinite(summary["test/acc"]) and summary["params"] > 0
    return summary


@pytest.mark.parametrize("experiment", files("experiment"))
def test_every_experiment_survives_an_epoch(tmp_path: Path, experiment: str) -> None:
    data = configure(tmp_path / "look", f"experiment={experiment}").choices.data
    options = generated(data, tmp_path / "data")
    summary = survives(tmp_path / "run", experiment, *options)
    assert (summary["data"], summary["experiment"]) == (data, experiment)


@pytest.mark.slow
def test_a_torchvision_model_survives_at_the_size_it_was_made_for(tmp_path: Path) -> None:
    options = generated("imagenette", tmp_path / "data")
    few = (
        "data.size=224",
        "+trainer.limit_train_batches=1",
        "+trainer.limit_val_batches=1",
        "data.batch_size=2",
    )
    chosen = ("model=torchvision", "model.name=alexnet", "+trainer.limit_test_batches=1")
    survives(tmp_path / "run", "imagenette_levels", *options, *chosen, *few)


@pytest.mark.data
@pytest.mark.parametrize("experiment", ["mnist", "cifar10"])
def test_experiments_survive_a_few_batches_of_real_data(tmp_path: Path, experiment: str) -> None:
    few = [f"+trainer.limit_{part}_batches=4" for part in ("train", "val")]
    survives(tmp_path, experiment, *few, "data.download=false", "data.batch_size=32")


@pytest.mark.parametrize("experiment", ["digits", "smoke"])
def test_experiments_survive_fast_dev_run(tmp_path: Path, experiment: str) -> None:
    """Lightning's own rehearsal: one batch, no logger, no checkpoint."""
    survives(tmp_path, experiment, "+trainer.fast_dev_run=true")
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("fresh", "optimizer"),
    [("zero_out", "sgd"), ("random", "adamw"), ("split", "sgd"), ("split", "adamw"), ("gradmax", "adamw")],
)
def test_every_start_runs(tmp_path: Path, optimizer: str, fresh: str) -> None:
    every = ("trigger=periodic", "trigger.every=1", "callbacks.growth.until=1.0", "trainer.max_epochs=2")
    chosen = (f"optimizer={optimizer}", f"callbacks.growth.fresh={fresh}", "callbacks.gates.begin=0.0")
    survives(tmp_path, "smoke", *every, *chosen)
    held = load(tmp_path / "last.ckpt")["elastic"]
    assert all(held["sizes"][name] > size for name, size in held["start"].items())


def test_the_data_folder_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_DATA", "/somewhere")
    assert configure(tmp_path, "data=mnist").data.root == "/somewhere"
    monkeypatch.delenv("ELASTIC_DATA")
    assert configure(tmp_path, "data=mnist").data.root == "data"


def test_one_seed_rules_all(tmp_path: Path) -> None:
    cfg = configure(tmp_path, "seed=5", "logger=wandb")
    assert cfg.seed == cfg.data.seed == 5 and cfg.logger.name == "digits-seed5"


def test_the_trainer_takes_what_lightning_takes(tmp_path: Path) -> None:
    cfg = configure(tmp_path, "+trainer.deterministic=true", "+trainer.gradient_clip_val=1.0", *QUICK)
    trainer = instantiate(cfg.trainer, logger=False)
    assert isinstance(trainer, L.Trainer) and trainer.gradient_clip_val == 1.0
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
