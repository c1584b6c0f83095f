"""Every option of every choice, with values that cannot be: one line that names it, before anything is built.

The options are those of the configuration itself. What each has to be is read from the signature that takes
it; here are values of every other kind.
"""

import copy
import gc
import math
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

import elastic.experiments.train
from elastic.errors import OptionError
from elastic.experiments.tools.checking import NUMBERS, check_options
from elastic.experiments.tools.loggers import make_loggers
from elastic.experiments.tools.memory import measure_training
from elastic.experiments.train import train
from tests.fitted import command
from tests.runs import CONF, TINY, configure, without_account

# Choices that between them have every option there is.
COMPOSED: tuple[tuple[str, ...], ...] = (
    ("schedule=[growth,gates,ema]", "optimizer=sgd", "lr_scheduler=onecycle", "trigger=plateau"),
    (
        "schedule=[growth,magnitude]",
        "callbacks.magnitude.budget=900",
        "trigger=periodic",
        "lr_scheduler=stable",
    ),
    ("schedule=[joint,resolution]", "data=shapes", "model=resnet20", "lr_scheduler=cosine"),
    ("schedule=reconstruct", "data=cifar10", "model=vgg16_bn", "lr_scheduler=multistep"),
    ("schedule=dynamic", "data=mnist", "model=alexnet", "lr_scheduler=step", "debug=profile"),
    ("data=imagenette", "model=narrow", "lr_scheduler=plateau", "experiment=cifar10"),
    ("data=imagenette", "model=torchvision", "lr_scheduler=constant", "logger=[csv,wandb]"),
)
# One of each kind; an option takes those of its own.
KINDS: dict[str, Any] = {
    "a word": "abc",
    "a number": 7.25,
    "none": math.nan,
    "no end": math.inf,
    "below": -3,
    "true": True,
    "nothing": None,
    "a list": [["x"]],
    "names": {"x": {"y": 1}},
}
# Options that take anything that is written: names, places, metrics; and those of others that say so.
FREE = {
    *("name", "run", "choices.data", "choices.model", "init", "timeline", "licence"),
    *("data.root", "data.dataset.path", "model.name", "trainer.accelerator", "trainer.strategy"),
    *("trainer.precision", "trainer.profiler.dirpath", "trainer.profiler.filename"),
    *("callbacks.census.folder", "callbacks.growth.monitor", "callbacks.growth.timeline"),
    *("task.metric", "callbacks.joint.sensitivity", "callbacks.reconstruct.sensitivity"),
}


def list_options(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """List the options of a composed configuration with their values."""
    for name, value in node.items():
        path = f"{key}.{name}" if key else str(name)
        if isinstance(value, dict) and ("_target_" in value or not key or key in ("callbacks", "logger")):
            yield from list_options(value, path)
        elif not str(name).startswith("_"):
            yield path, value


def kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return {str: "text", list: "list", dict: "names", type(None): "null"}[type(value)]


def is_possible(default: Any, value: Any) -> bool:
    """Tell whether a value is of the same kind as an option's own, as far as a kind tells."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return kind_of(default) == kind_of(value) or (default is None and value is None)


def refuses(cfg: DictConfig, key: str, value: Any) -> bool:
    """Tell whether an option is refused in one line that names it."""
    changed = copy.deepcopy(cfg)
    with open_dict(changed):
        OmegaConf.update(changed, key, value, merge=False)
    try:
        check_options(changed)
    except OptionError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 500, text
        return True
    return False


# Options that take more than the kind they have, by their signature or because what makes them says no.
MEANT: dict[str, tuple[str, ...]] = {
    "threads": ("nothing",),
    "data.augment": ("nothing",),
    "trainer.devices": ("a word",),
    "trainer.max_epochs": ("nothing",),  # where steps or time end the run
    "trainer.enable_model_summary": ("nothing",),
    "trainer.plugins": ("nothing",),
    "callbacks.dynamic.kind": ("below",),
    "callbacks.growth.fresh": ("below",),
    "callbacks.gates.budget": ("below",),
    "callbacks.magnitude.budget": ("below",),
}


@pytest.mark.parametrize(
    ("overrides", "step"),
    [(COMPOSED[0], 4), *(pytest.param(line, 1, marks=pytest.mark.slow) for line in COMPOSED)],
    ids=lambda value: value if isinstance(value, int) else " ".join(value),
)
def test_an_option_of_another_type_is_refused(tmp_path: Path, overrides: tuple[str, ...], step: int) -> None:
    """By default each option with some of the kinds, in turn."""
    cfg = configure(tmp_path, *overrides)
    check_options(cfg)
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    trials = [
        (key, default, what, value)
        for key, default in list_options(content)
        for what, value in KINDS.items()
        if key not in FREE
        and not key.startswith(("logger.", "callbacks.growth.trigger."))  # the trigger stands elsewhere, too
        and not is_possible(default, value)
        and what not in MEANT.get(key, ())
    ]
    assert len(trials) > 150
    accepted = [trial for trial in trials[::step] if not refuses(cfg, trial[0], trial[3])]
    assert not accepted, accepted


RANGES: dict[str, tuple[str, ...]] = {
    "seed": ("-1", "4294967296", "1.5"),
    "threads": ("0", "-1", "1000000"),
    "label_smoothing": ("2", "-1", "1", "nan"),
    "optimizer.lr": ("-1", "nan", "inf"),
    "optimizer.momentum": ("1", "-0.1", "nan"),
    "optimizer.weight_decay": ("-1", "inf"),
    "lr_scheduler.pct_start": ("2", "0", "-1", "nan"),
    "trainer.max_epochs": ("0", "-2", "2.5"),
    "trainer.log_every_n_steps": ("-1",),
    "+trainer.gradient_clip_val": ("-1", "inf"),
    "+trainer.limit_train_batches": ("2.5", "-1"),
    "+trainer.accumulate_grad_batches": ("0", "1.5"),
    "data.batch_size": ("0", "-1", "2.5"),
    "data.val_fraction": ("1", "-0.1", "nan"),
    "data.mean": ("[nan]", "[inf]", "0.3"),
    "data.std": ("[0]", "[-1]", "[nan]"),
    "+data.workers": ("-1", "2000"),
    "data.augment.affine.degrees": ("-1", "nan"),
    "model.channels": ("[0]", "[4,-1]", "[2.5]", "4"),
    "callbacks.growth.until": ("7", "-1", "nan"),
    "callbacks.growth.amount.factor": ("1", "0", "inf"),
    "callbacks.growth.amount.multiple": ("2.5", "0"),
    "callbacks.growth.amount.ceiling": ("inf", "0.5", "nan"),
    "callbacks.gates.penalty": ("-1", "inf"),
    "callbacks.gates.begin": ("-1", "2"),
    "callbacks.gates.grace": ("-1", "1.5"),
    "callbacks.gates.budget": ("nan", "inf", "2.5"),
    "callbacks.gates.grain": ("ones", "3"),
    "trigger.patience": ("0", "2.5"),
    "trigger.min_gain": ("-1", "nan"),
    "callbacks.ema.decay": ("2", "1", "-1"),
    "objectives": ("[val/ac]", "[]", "val/acc", "[params,mac]"),
    "callbacks.checkpoint.filename": ("best",),
    "callbacks.checkpoint.dirpath": ("elsewhere",),
    "+callbacks.checkpoint.save_top_k": ("0", "3"),
    "+callbacks.checkpoint.save_weights_only": ("true",),
    "+trainer.logger": ("false",),
    "+optimizer.momentun": ("0.9",),
    "model._target_": ("nowhere.net", "elastic.models.nothing", "elastic", "3"),
}


@pytest.mark.sampled(20)
@pytest.mark.parametrize("key", RANGES)
def test_a_value_out_of_its_range_is_refused(tmp_path: Path, key: str) -> None:
    cfg = configure(tmp_path, "schedule=[growth,gates,ema]", "optimizer=sgd")
    for text in RANGES[key]:
        value = yaml.safe_load(re.sub(r"\b(nan|inf)\b", r".\1", text))
        assert refuses(cfg, key.lstrip("+"), value), text


def test_a_whole_number_may_be_written_as_another(tmp_path: Path) -> None:
    given = (
        "seed=1e3",
        "data.batch_size=64.0",
        "model.channels=[4.0,6]",
        "name=2026",
        "trainer.max_epochs=1e1",
    )
    cfg = configure(tmp_path, *given)
    check_options(cfg)
    read = (cfg.seed, cfg.data.batch_size, list(cfg.model.channels), cfg.name, cfg.trainer.max_epochs)
    assert repr(read) == "(1000, 64, [4, 6], '2026', 10)"


@pytest.mark.parametrize("overrides", COMPOSED, ids=" ".join)
def test_what_the_choices_say_is_possible(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    check_options(configure(tmp_path, *overrides))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_what_experiments_say_is_possible(tmp_path: Path, experiment: str) -> None:
    check_options(configure(tmp_path, f"experiment={experiment}"))


@pytest.mark.parametrize(
    ("part", "name", "value", "named"),
    [
        ("lr_scheduler", "total_steps", 2, "given by the run itself"),
        ("lr_scheduler", "last_epoch", 5, "given by the run itself"),
        ("trainer", "min_epochs", 50, "trainer.max_epochs is 3"),
        ("trainer", "max_steps", 0, "1 or more or -1"),
    ],
)
def test_a_length_that_cannot_be_is_refused(
    tmp_path: Path, part: str, name: str, value: int, named: str
) -> None:
    cfg = configure(tmp_path, *TINY)
    with open_dict(cfg):
        cfg[part][name] = value
    with pytest.raises(OptionError, match=named):
        check_options(cfg)


def test_objectives_are_in_every_summary(tmp_path: Path) -> None:
    summary = train(configure(tmp_path, *TINY, "callbacks.gates.budget=800"), tmp_path)
    assert all(isinstance(summary[name], int | float) for name in NUMBERS)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (("optimizer=sgd", "optimizer.momentum=0"), "Nesterov"),
        (("schedule=joint", "callbacks.joint.fractions=[0.8,0.5]"), "do not ascend"),
        (("schedule=joint", "callbacks.joint.fractions=[0.5,1.5]"), "1.5 is no fraction"),
        (("schedule=joint", "callbacks.joint.fractions=[]"), "do not ascend"),
        (("callbacks.gates.begin=0.9",), "set begin below end"),
        (("callbacks.gates.budget=-5",), "a budget of -5"),
        (("schedule=dynamic", "callbacks.dynamic.gain=[]"), "0 gains"),
        (("trainer.devices=0",), "devices"),
        (("trainer.strategy=fast",), "fast"),
        (("trainer.num_sanity_val_steps=0", "data.mean=[1e38]"), "images are as large as 2.7e+38"),
        (("=3",), "=3 names no option"),
        (("run=",), "run= names no folder"),
        (("schedule=3",), "there is no schedule=3: choose distil"),
        (("data=3",), "there is no data=3: choose cifar10"),
        (("callbacks=null",), "there is no callbacks=null: choose default"),
        (("-m", "seed=1"), "put flags first"),
        (("optimizer=null",), "there is no optimizer: choose one, such as optimizer=adamw"),
        (("model=null",), "there is no model"),
        (("data=folder", "data.root=/nonexistent"), "/nonexistent"),
        (("init=/nonexistent",), "/nonexistent"),
        (("timeline=/nonexistent",), "/nonexistent"),
        (("schedule=[static,distil]",), "init=<folder of a finished run>"),
        (("data.augment=[]",), "data.augment=[] cannot be, it has options with names"),
        (("trust=null",), "trust=null cannot be"),
        (("+learning_rate=1",), "there is no option learning_rate"),
        (("~trainer.max_epochs",), "nothing ends this run"),
        (("trainer.max_epochs=null",), "nothing ends this run"),
        (("task.metric=-3",), "metric"),
        (("schedule=joint", "callbacks.joint.sensitivity=/nonexistent"), "/nonexistent"),
        (("+callbacks.x._target_=torch.nn.ReLU",), "callbacks.x names torch.nn.ReLU, which is no callback"),
        (("+optimizer.capturable=true",), "optimizer: If capturable=True"),
        (("trainer.devices=10000", "trainer.strategy=ddp"), "set trainer.devices to"),
        (("model.channels=[1000000,1000000]",), "a step of training takes 7"),
        (("model=narrow", "model.model.width=10000000"), "choose a smaller model"),
    ],
)
def test_what_options_cannot_be_together_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: tuple[str, ...],
    named: str,
) -> None:
    given = (*TINY, f"run={tmp_path}", *wrong)
    code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, *given)
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: ") and named in err, err
    assert not {"last.ckpt", "summary.json"} & {path.name for path in tmp_path.iterdir()}


def test_what_fails_while_a_run_is_set_up_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even a fault of somebody's code, which options lead to; later, a traceback tells more."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("by nothing\nat all")

    monkeypatch.setattr(elastic.experiments.train, "make_recipe", fail)
    code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, *TINY, f"run={tmp_path}")
    assert code == 1 and err.count("\n") == 1
    assert "cannot be set up (ZeroDivisionError: by nothing)" in err


def test_wandb_online_needs_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    without_account(monkeypatch, tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a login would be
    cfg = configure(tmp_path, "logger=[wandb]", "logger.wandb.offline=false")
    try:
        with pytest.raises(OptionError, match=r"logger\.wandb needs an account: log in with `wandb login`"):
            make_loggers(cfg)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert make_loggers(cfg)
    finally:
        wandb.teardown()  # it reads the environment once a process


def test_images_that_are_not_finite_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the learning rate."""
    monkeypatch.setattr("elastic.data.images.ImageData.normalise", lambda self, x_BCHW: x_BCHW * math.nan)
    with pytest.raises(Exception, match=r"images are as large as nan .* data\.mean"):
        train(configure(tmp_path, *TINY), tmp_path)


def test_every_group_is_composed() -> None:
    """A choice that stands in no line above would have options that nothing here looks at."""
    said = " ".join(word for line in COMPOSED for word in line)
    for group in ("schedule", "lr_scheduler"):
        names = {path.stem for path in (CONF / group).glob("*.yaml")} - {"static", "distil"}
        assert not [name for name in names if name not in said]


def test_a_network_is_not_kept_by_what_measures_it() -> None:
    """Saved activations, its input and two outputs, lead back to it, out of reach of Python's collector."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Sigmoid())
        need = measure_training(net, torch.empty(2, 1, 8, 8))
    weights, activations = (
        (4 * 9 + 4) + (8 * 4 * 9 + 8),
        2 * (64 + 4 * 36 + 8 * 16),
    )  # its input, and two outputs
    assert need == 4 * (2 * weights + activations)
    held = weakref.ref(net[0].weight)
    del net
    gc.collect()
    assert held() is None
