"""Test that all of the configuration composes and can be made, and that a command means what it says."""

import json
import os
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

from elastic.callbacks import Census, ElasticProgress, GrowOnSaturation, PruneByGates
from elastic.data import ImageData
from elastic.errors import OptionError
from elastic.experiments.tools.composition import rewrite
from elastic.experiments.tools.folders import load_config, write_config
from elastic.experiments.tools.loggers import make_loggers
from elastic.experiments.tools.parts import make_recipe
from elastic.experiments.train import build, train
from elastic.growth import Growth, Periodic, Plateau
from tests.generated import generate
from tests.runs import CONF, configure, load, without_account

QUICK = (
    *("callbacks.progress=null", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1"),
    *("trainer.max_epochs=1", "trainer.precision=32-true"),
)


def files(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def node(group: str, name: str) -> Any:
    """A choice as it stands in its file, with what it takes from elsewhere in the configuration."""
    cfg = OmegaConf.create(
        {"seed": 0, "optimizer": {"lr": 0.1}, "model": OmegaConf.load(CONF / group / f"{name}.yaml")}
    )
    return cfg.model


HYDRAS = "hydra"  # its own groups, launchers say, which its own defaults list names
GROUPS = sorted(
    path.name for path in CONF.iterdir() if path.is_dir() and path.name not in (HYDRAS, "__pycache__")
)
# Choices of these say what others are, so that each is composed by itself.
DELTAS = ("experiment", "sweep", "debug")
LISTS = {"schedule": "[growth,{}]", "logger": "[{}]"}  # growth is what reads a trigger


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
    assert set(GROUPS) == {str(name) for name in named if not str(name).startswith("override")}


def composed() -> list[tuple[str, ...]]:
    """Overrides in which each choice of each group occurs: one of each at a time, deltas alone."""
    columns = [
        [f"{group}={LISTS.get(group, '{}').format(name)}" for name in files(group)]
        for group in GROUPS
        if group not in DELTAS
    ]
    rows = [tuple(option for option in row if option) for row in zip_longest(*columns)]
    return rows + [(f"{group}={name}",) for group in DELTAS for name in files(group)]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("overrides", composed(), ids=" ".join)
def test_every_choice_composes(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """And every class or function it names can be imported."""
    cfg = configure(tmp_path, *overrides)
    names = targets(OmegaConf.to_container(cfg))
    assert len(names) > 8
    for name in names:
        assert callable(instantiate({"_target_": "hydra.utils.get_object", "path": name}))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [name for name in files("model") if name != "narrow"])
def test_every_model_can_be_made_and_be_narrow(name: str) -> None:
    if name == "timm":
        pytest.importorskip("timm")
    whole = instantiate(node("model", name), in_channels=3, classes=7)
    pixels = (32, 32) if name == "unet" else ()
    assert isinstance(whole, nn.Module)
    assert whole.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7, *pixels)
    fraction = OmegaConf.merge({"_target_": "elastic.models.narrow.narrow", "fraction": 0.5, "pixels": 32})
    fraction.model = {**node("model", name), "_partial_": True}
    narrow = instantiate(fraction, in_channels=3, classes=7)
    most = 0.7 if name == "unet" else 0.6  # what is concatenated in front stays whole
    assert sum(p.numel() for p in narrow.parameters()) < most * sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("name", files("optimizer"))
def test_every_optimizer_can_be_made(name: str) -> None:
    optimizer = instantiate(node("optimizer", name))([nn.Parameter(torch.zeros(2))])
    assert optimizer.param_groups[0]["lr"] == node("optimizer", name).lr


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", sorted({*files("data")} - {"huggingface"}))  # whose extra may be missing
def test_every_data_set_can_be_named_without_being_there(tmp_path: Path, name: str) -> None:
    """Making it reads nothing; digits need no download at all."""
    cfg = configure(tmp_path, f"data={name}").data
    if "root" in cfg:
        cfg.root = str(tmp_path)
    if name == "folder":  # its classes are its folders
        for part in ("train", "test"):
            (tmp_path / part / "one").mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / part / "one" / "1.png")
    if name == "csv":
        (tmp_path / "train.csv").write_text("path,label\none/1.png,one\n")
    data = instantiate(cfg)
    assert isinstance(data, ImageData) and len(data.mean) == len(data.std) == data.shape[0]
    assert data.classes in (1, 2, 3, 4, 10, 20, 100)


@pytest.mark.parametrize(
    ("name", "kind"), [("plateau", Plateau), ("impatient", Plateau), ("periodic", Periodic)]
)
def test_every_trigger_can_be_made(name: str, kind: type) -> None:
    assert isinstance(instantiate(node("trigger", name)), kind)
    assert set(files("trigger")) == {"plateau", "impatient", "periodic"}


def test_the_callbacks_can_be_made(tmp_path: Path) -> None:
    made = {name: instantiate(c) for name, c in configure(tmp_path).callbacks.items()}
    assert {Census, ElasticProgress, GrowOnSaturation, PruneByGates} <= {type(c) for c in made.values()}
    assert isinstance(made["growth"].amount, Growth) and isinstance(made["growth"].trigger, Plateau)


# --- what a command means -----------------------------------------------------------------------------------


def test_no_experiment_is_on_by_default(tmp_path: Path) -> None:
    cfg = configure(tmp_path, "data=cifar10", "model=resnet20", "callbacks.growth.amount.blocks=3")
    assert cfg.name == "cifar10-resnet20" and cfg.callbacks.growth.amount.blocks == 3
    assert (cfg.trainer.max_epochs, cfg.trainer.precision) == (60, "auto")
    assert cfg.callbacks.gates.budget is None and cfg.lr_scheduler.pct_start == 0.2
    assert cfg.data.batch_size == 128 and set(cfg.data.augment) == {"crop", "flip"}


def test_an_experiment_is_what_it_says(tmp_path: Path) -> None:
    cfg = configure(tmp_path, "experiment=digits")
    assert (cfg.name, cfg.trainer.max_epochs, cfg.callbacks.gates.budget) == ("digits", 120, 2000)


@pytest.mark.parametrize("budget", ["2000", "2e3", "2000.0"])
def test_a_budget_is_a_whole_number_however_it_is_written(tmp_path: Path, budget: str) -> None:
    cfg = configure(tmp_path, f"callbacks.gates.budget={budget}").callbacks
    assert repr(instantiate(cfg.gates).budget.target) == "2000"


def test_half_a_parameter_is_no_budget(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"budget of 2000\.5 cannot be met"):
        instantiate(configure(tmp_path, "callbacks.gates.budget=2000.5").callbacks.gates)


UNREAD = {
    "a callback's option": ("schedule=static", "experiment=digits", "callbacks.gates.budget=2000"),
    "even if it is null": ("schedule=static", "experiment=digits", "callbacks.gates.budget=null"),
    "a new one": ("schedule=static", "+callbacks.gates.budget=2000"),
    "a trigger's": ("schedule=gates", "trigger.patience=2"),
    "a trigger": ("schedule=[joint]", "trigger=periodic"),
    "a timeline": ("schedule=static", "timeline=a/timeline.jsonl"),
}


@pytest.mark.parametrize("what", UNREAD)
def test_an_option_that_nothing_takes_is_refused(tmp_path: Path, what: str) -> None:
    *_, unread = UNREAD[what]
    with pytest.raises(OptionError, match=r"nothing takes .*this run has no '(gates|growth)'") as caught:
        configure(tmp_path, *UNREAD[what])
    assert unread in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["nonsense", "3"])
def test_what_is_no_callback_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(OptionError, match=r"callbacks\.gates=.* is no callback"):
        configure(tmp_path, f"callbacks.gates={value}")


def test_a_callback_is_left_out_by_null(tmp_path: Path) -> None:
    assert {"growth", "gates"} <= set(configure(tmp_path).callbacks)
    assert configure(tmp_path, "callbacks.gates=null").callbacks.gates is None


def test_an_experiments_options_go_with_what_the_command_line_replaces(tmp_path: Path) -> None:
    """Of the schedule, the scheduler, the optimizer and the model; the command line's own stay."""
    cfg = configure(
        tmp_path, "experiment=digits", "schedule=static", "lr_scheduler=step", "lr_scheduler.gamma=0.5"
    )
    assert not {"growth", "gates"} & set(cfg.callbacks)
    assert dict(cfg.lr_scheduler) == {**node("lr_scheduler", "step"), "gamma": 0.5}
    cfg = configure(tmp_path, "experiment=cifar10", "optimizer=sgd", "model=vgg16_bn", "optimizer.lr=0.05")
    assert (cfg.optimizer.weight_decay, cfg.optimizer.lr, cfg.model.width) == (5e-4, 0.05, 64)
    assert configure(tmp_path, "experiment=cifar10", "optimizer.lr=1e-3").optimizer.weight_decay == 4e-2


@pytest.mark.parametrize(
    ("word", "rewritten"),
    [
        ("run=~/x", "run=/home/someone/x"),
        ("data.root=~", "data.root=/home/someone"),
        ("seed=1", "seed=1"),
        ("~logger", "~logger"),
        ("--multirun", "--multirun"),
        ("logger=null", "logger=[]"),
        ("lr_scheduler=null", "~lr_scheduler"),
        ("callbacks.gates=null", "callbacks.gates=null"),
        ("init=null", "init=null"),
    ],
)
def test_words_that_hydra_does_not_know_are_rewritten(
    monkeypatch: pytest.MonkeyPatch, word: str, rewritten: str
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert rewrite(word) == rewritten


def test_several_loggers_are_all_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_account(monkeypatch, tmp_path)
    csv, wandb = make_loggers(configure(tmp_path, "logger=[csv,wandb]", "seed=5"))
    assert isinstance(csv, CSVLogger) and Path(csv.log_dir).parent == tmp_path / "metrics"
    assert isinstance(wandb, WandbLogger) and wandb._wandb_init["name"] == "digits-convnet-seed5"
    assert make_loggers(configure(tmp_path, "logger=[]")) == []


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_logger_works_or_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = configure(tmp_path, f"logger=[csv,{name}]")
    try:
        loggers = make_loggers(cfg)
    except OptionError as error:
        assert str(error).endswith(f"pip install 'elastic-cnn[{name}]'") and "\n" not in str(error)
    else:
        assert len(loggers) == 2


def test_the_data_folder_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_DATA", "/somewhere")
    assert configure(tmp_path, "data=mnist").data.root == "/somewhere"
    monkeypatch.delenv("ELASTIC_DATA")
    assert configure(tmp_path, "data=mnist").data.root == "data"


def test_triggers_and_growth_of_a_command_line_are_those_of_python(tmp_path: Path) -> None:
    for trigger, kind in ("plateau", Plateau), ("periodic", Periodic):
        growth = configure(tmp_path, "schedule=growth", f"trigger={trigger}").callbacks.growth
        assert instantiate(growth.trigger) == kind() and instantiate(growth.amount) == Growth()


def test_the_trainer_takes_what_lightning_takes(tmp_path: Path) -> None:
    cfg = configure(tmp_path, "+trainer.deterministic=true", "+trainer.gradient_clip_val=1.0", *QUICK)
    trainer = instantiate(cfg.trainer, logger=False)
    assert isinstance(trainer, L.Trainer) and trainer.gradient_clip_val == 1.0
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


# --- runs ---------------------------------------------------------------------------------------------------


FEW = ("+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1", "data.batch_size=64")
SCHEDULES = {
    "static": "static",
    "[growth]": "growth",
    "[gates]": "gates",
    "[gates,growth,ema]": "growth+gates+ema",
    "[growth,magnitude]": "growth+magnitude",
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_every_schedule_runs(tmp_path: Path, schedule: str) -> None:
    budget = ["callbacks.magnitude.budget=900"] if "magnitude" in schedule else []
    summary = train(configure(tmp_path, *QUICK, *FEW, f"schedule={schedule}", *budget), tmp_path)
    assert summary["schedule"] == SCHEDULES[schedule]
    gated = any("score" in name for name in load(tmp_path / "last.ckpt")["state_dict"])
    assert gated == ("gates" in schedule or "magnitude" in schedule)


@pytest.mark.parametrize("name", files("lr_scheduler"))
def test_every_scheduler_can_be_made(name: str) -> None:
    cfg = OmegaConf.create(
        {"optimizer": node("optimizer", "sgd"), "lr_scheduler": node("lr_scheduler", name)}
    )
    assert all(callable(make) for make in make_recipe(cfg))


@pytest.mark.parametrize("name", ["onecycle", "multistep"])
def test_a_scheduler_runs_at_its_own_pace(tmp_path: Path, name: str) -> None:
    """By epochs or batches: what torch's own would do is tested elsewhere."""
    logged = (
        "trainer.max_epochs=2",
        "schedule=static",
        f"lr_scheduler={name}",
        *(["lr_scheduler.milestones=[1]"] if name == "multistep" else []),
        "+trainer.limit_train_batches=5",
    )
    train(configure(tmp_path, *QUICK, "data.batch_size=64", *logged), tmp_path)
    lines = (tmp_path / "metrics" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("lr-AdamW/pg1")
    rates = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert len(rates) == 10 and len(set(rates)) == (10 if name == "onecycle" else 2)


def survive(folder: Path, experiment: str, *options: str) -> dict[str, Any]:
    few = ["+trainer.limit_train_batches=3"] * (not any("limit_train" in option for option in options))
    summary = train(configure(folder, *QUICK, f"experiment={experiment}", *few, *options), folder)
    assert np.isfinite(summary["test/acc"]) and summary["params"] > 0
    return summary


RECORDED = Path(__file__).parents[2] / "experiments"
COSTLY = (
    "cifar10",
    "cifar10_smallest",
    "cifar10_levels",
    "cifar10_dynamic",
    "cifar10_looking",
    "imagenette_levels",
    "mnist_dynamic",
)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("experiment", [name for name in files("experiment") if name != "imagenette_levels"])
def test_every_experiment_can_begin(tmp_path: Path, experiment: str) -> None:
    cfg = configure(tmp_path, f"experiment={experiment}")
    module, data = build(cfg)
    assert cfg.name == experiment and module.structure.example.shape[1:] == data.shape


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "experiment",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in COSTLY)) for name in files("experiment")],
)
def test_every_experiment_survives_an_epoch(tmp_path: Path, experiment: str) -> None:
    data = configure(tmp_path / "look", f"experiment={experiment}").choices.data
    options = generate(data, tmp_path / "data")
    if experiment == "cifar10_looking":  # it starts from a network, which also teaches it
        options = (*options, f"init={RECORDED / 'prune_and_grow/resnet20-dense-seed0'}")
    summary = survive(tmp_path / "run", experiment, *options)
    assert (summary["data"], summary["experiment"]) == (data, experiment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "data"),
    [("mnist", "fashion_mnist"), ("cifar10", "cifar100"), ("cifar10_smallest", "cifar100")],
)
def test_a_recipe_serves_data_of_the_same_shape(tmp_path: Path, experiment: str, data: str) -> None:
    """It is unchanged: its own options hold whatever is read, and the last layer is that of the classes."""
    recipe, other = (
        configure(tmp_path / str(len(more)), f"experiment={experiment}", *more)
        for more in ((), (f"data={data}",))
    )
    for part in ("data.batch_size", "data.val_fraction", "trainer", "optimizer", "callbacks.gates.budget"):
        assert OmegaConf.select(recipe, part) == OmegaConf.select(other, part), part
    generated = generate(data, tmp_path / "data")
    summary = survive(tmp_path / "run", experiment, f"data={data}", *generated)
    assert summary["data"] == data and summary["params"] <= other.callbacks.gates.budget.target


@pytest.mark.slow
def test_a_torchvision_model_survives_at_the_size_it_was_made_for(tmp_path: Path) -> None:
    options = generate("imagenette", tmp_path / "data")
    limits = (
        "+trainer.limit_train_batches=1",
        "+trainer.limit_val_batches=1",
        "+trainer.limit_test_batches=1",
    )
    large = ("data.size=224", "data.batch_size=2", "model=torchvision", "model.name=alexnet")
    survive(tmp_path / "run", "imagenette_levels", *options, *large, *limits)


@pytest.mark.data
@pytest.mark.parametrize("experiment", ["mnist", "cifar10"])
def test_experiments_survive_a_few_batches_of_real_data(tmp_path: Path, experiment: str) -> None:
    few = [f"+trainer.limit_{part}_batches=4" for part in ("train", "val")]
    survive(tmp_path, experiment, *few, "data.download=false", "data.batch_size=32")


def test_one_batch_is_neither_logged_nor_a_checkpoint(tmp_path: Path) -> None:
    summary = train(configure(tmp_path, "debug=batch", "trainer.accelerator=cpu"), tmp_path)
    assert (
        summary["epochs"] == 1
        and not (tmp_path / "last.ckpt").exists()
        and not (tmp_path / "metrics").exists()
    )


@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")  # and does what we want
def test_a_few_batches_are_learnt_by_heart(tmp_path: Path) -> None:
    still = ("trainer.max_epochs=12", "schedule=static", "trainer.accelerator=cpu", "callbacks.progress=null")
    still = (*still, "model.channels=[32,32,32,32]")
    train(configure(tmp_path, "debug=overfit", *still), tmp_path)
    last = (tmp_path / "history.jsonl").read_text().splitlines()[-1]
    assert float(last.split('"train/acc": ')[1].split(",")[0].rstrip("}")) > 0.9


def test_a_profile_is_in_the_runs_folder(tmp_path: Path) -> None:
    train(configure(tmp_path, *QUICK, *FEW, "debug=profile"), tmp_path)
    assert "run_training_batch" in (tmp_path / "fit-profile.txt").read_text()


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("fresh", "optimizer"), [("split", "sgd"), ("gradmax", "adamw")])
def test_a_start_runs_with_an_optimizer(tmp_path: Path, optimizer: str, fresh: str) -> None:
    every = ("trigger=periodic", "trigger.every=1", "callbacks.growth.until=1.0", "trainer.max_epochs=2")
    chosen = (f"optimizer={optimizer}", f"callbacks.growth.fresh={fresh}", "callbacks.gates.begin=0.0")
    survive(tmp_path, "smoke", *FEW, *every, *chosen)
    events = [json.loads(line) for line in (tmp_path / "timeline.jsonl").read_text().splitlines()]
    assert len({event["width"] for event in events if event["after"] > event["before"]}) == 4


def test_what_is_kept_of_a_run_names_no_place_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where a value is the place itself, nor where it refers to one."""
    monkeypatch.setenv("ELASTIC_DATA", str(tmp_path / "here"))
    write_config(configure(tmp_path, "data=cifar10_mnist", "schedule=static"), tmp_path)
    assert str(tmp_path) not in (tmp_path / "config.yaml").read_text()
    monkeypatch.setenv("ELASTIC_DATA", "there")
    data = load_config(tmp_path).data
    assert {data.root, *(part.root for part in data.sets.values())} == {"there"}
