"""What a recorded configuration names is called: what the package needs, and what its user trusts."""

import copy
import json
import sys
from collections.abc import Iterator
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

import elastic.experiments.evaluate
import elastic.experiments.train
from elastic.errors import ElasticError, FileError
from elastic.experiments.tools import trust
from elastic.experiments.tools.folders import load_config, read_config
from elastic.experiments.tools.restore import restore
from elastic.experiments.tools.trust import check_trust, is_trusted
from elastic.experiments.train import train
from tests.fitted import command
from tests.runs import CONF, TINY, configure

ROOT = CONF.parent
MODEL = """
from pathlib import Path
from elastic.models import convnet
Path("imported").touch()
def build(in_channels, classes):
    return convnet([3, 4], [1], in_channels, classes)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_modules", set())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(configure(folder, *TINY), folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, finished: Path) -> Path:
    """A folder with the files of a finished run."""
    for file in finished.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def alter(folder: Path, change: Any) -> None:
    cfg = yaml.safe_load((folder / "config.yaml").read_text())
    change(cfg)
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))


# What would write a file here if it were called.
CALLS: dict[str, dict[str, Any]] = {
    "a function of the system": {"_target_": "os.system", "command": "touch called"},
    "its arguments by place": {"_target_": "os.system", "_args_": ["touch called"]},
    "a builtin": {"_target_": "builtins.open", "file": "called", "mode": "w"},
    "torch's reader": {"_target_": "torch.load", "f": "evil.pt", "weights_only": False},
    "torch's hub": {"_target_": "torch.hub.load", "repo_or_dir": ".", "model": "x", "source": "local"},
    "another's reader": {"_target_": "joblib.load", "filename": "evil.pt"},
    "a module of this folder": {"_target_": "evil.build"},
    "what a module of ours has imported": {"_target_": "elastic.data.sets.torch.load", "f": "evil.pt"},
    "what writes files, of ours": {
        "_target_": "elastic.experiments.tools.tables.write_csv",
        "path": "called",
        "head": ["a"],
        "rows": [],
    },
    "a way round": {"_target_": "hydra.utils.call", "config": {"_target_": "os.system"}},
    "a class's way round": {"_target_": "hydra.utils.get_method", "path": "os.system"},
    "a part of it": {"_target_": "os.system", "_partial_": True, "command": "touch called"},
    "what is computed": {"_target_": "${oc.decode:os.system}", "command": "touch called"},
    "what stands elsewhere": {"_target_": "${name}"},
    "what is made of text": {"model": "${oc.create:'{_target_: os.system}'}"},
    "another's download": {
        "_target_": "torchvision.datasets.utils.download_url",
        "url": "file:///etc/hostname",
        "root": ".",
        "filename": "called",
    },
    "no name": {"_target_": 3},
}
# Where it stands in the configuration.
PLACES: dict[str, Any] = {
    "data": lambda cfg, node: cfg.update(data=node),
    "an argument of the data": lambda cfg, node: cfg["data"].update(mean=node),
    "an augmentation": lambda cfg, node: cfg["data"]["augment"].update(evil=node),
    "model": lambda cfg, node: cfg.update(model=node),
    "deep in a list": lambda cfg, node: cfg["model"].update(channels=[[{"x": node}]]),
    "trainer": lambda cfg, node: cfg["trainer"]["plugins"].append(node),
    "a callback": lambda cfg, node: cfg["callbacks"].update(evil=node),
    "a logger": lambda cfg, node: cfg["logger"].update(evil=node),
}


QUICK = list(zip(CALLS, cycle(PLACES), strict=False))  # each call in some place, each place with some call
ALL = [pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in QUICK)) for pair in product(CALLS, PLACES)]


@pytest.mark.parametrize(("call", "place"), ALL)
def test_nothing_else_is_called(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, place: str) -> None:
    (folder / "evil.py").write_text("open('called', 'w')\n")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    alter(folder, lambda cfg: PLACES[place](cfg, CALLS[call]))
    with pytest.raises(FileError, match=r"config\.yaml (names|computes) ") as caught:
        restore(folder)
    assert "\n" not in str(caught.value) and not Path("called").exists()


@pytest.mark.parametrize("main", [elastic.experiments.evaluate.main, elastic.experiments.train.main])
def test_the_line_names_target_file_and_switch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: Any
) -> None:
    alter(folder, lambda cfg: cfg["model"].update(_target_="my_package.build"))
    code, _, err = command(main, monkeypatch, capsys, f"run={folder}")
    assert code == 1 and err.count("\n") == 1
    assert err.startswith(f"error: {folder}/config.yaml names my_package.build, ")
    assert err.rstrip().endswith("add trust=[my_package]")


def own(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Put a module of the user's own where Python finds it."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    Path(f"{name}.py").write_text(MODEL)
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_users_own_is_trusted_where_the_command_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own(tmp_path, monkeypatch, "mine")
    run = tmp_path / "run"
    own_model = ("~model.channels", "~model.pools", "model._target_=mine.build")
    given = (*TINY, f"run={run}", *own_model, "schedule=gates")
    code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, *given)
    assert code == 0, err
    assert "trust" not in read_config(run)
    for main in (elastic.experiments.evaluate.main, elastic.experiments.train.main):
        assert command(main, monkeypatch, capsys, f"run={run}")[0] == 1
    for main in (elastic.experiments.evaluate.main, elastic.experiments.train.main):
        code, _, err = command(main, monkeypatch, capsys, f"run={run}", "trust=[mine]")
        assert code == 0, err
        trust._modules.clear()


def test_what_is_not_trusted_is_not_even_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(folder, monkeypatch, "theirs")
    alter(folder, lambda cfg: cfg.update(model={"_target_": "theirs.build"}))
    with pytest.raises(FileError, match=r"add trust=\[theirs\]"):
        load_config(folder)
    assert not Path("imported").exists()
    trust.trust_modules(["theirs"])
    assert instantiate(load_config(folder).model, in_channels=1, classes=2) is not None
    assert Path("imported").exists()


def test_a_teachers_configuration_is_a_recorded_one(folder: Path) -> None:
    alter(folder, lambda cfg: cfg["model"].update(_target_="os.system"))
    cfg = configure(folder / "new", *TINY, "schedule=[gates,distil]", f"init={folder}")
    with pytest.raises(Exception, match=r"config\.yaml names os\.system"):
        train(cfg, folder / "new")


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node.get("path", node["_target_"]) if "get_class" in node["_target_"] else node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def test_all_that_the_choices_name_is_trusted() -> None:
    """But for Hydra's callback of a sweep, which no run has."""
    names = {
        name
        for path in CONF.rglob("*.yaml")
        if "hydra" not in path.parts
        for name in targets(OmegaConf.to_container(OmegaConf.load(path), resolve=False))
    }
    assert len(names) > 30
    assert {name for name in names if not is_trusted(name)} == {"elastic.experiments.tools.sweep.Sweep"}


def test_all_recorded_configurations_are_trusted() -> None:
    files = sorted((ROOT / "experiments").glob("*/*/config.yaml"))
    assert len(files) > 50
    for file in files[::5]:
        check_trust(yaml.safe_load(file.read_text()), file)


# --- damage -------------------------------------------------------------------------------------------------

DAMAGE: dict[str, bytes] = {
    "nothing": b"",
    "a comment": b"# nothing\n",
    "half a line": b"name: digits\nseed: 0\ndata:\n  _tar",
    "a list": b"[1, 2]\n",
    "a word": b"digits\n",
    "a number": b"7\n",
    "no text": b"\xff\xfe\x00\x01",
    "no YAML": b"{name: [}\n",
    "a tag that makes objects": b"!!python/object/apply:os.system ['touch called']\n",
    "a key twice": b"name: a\nname: b\n",
    "no end of brackets": b"[" * 5000,
    "what grows without end": b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "an interpolation that is none": b"name: ${a\n",
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, name in enumerate(DAMAGE)]
)
def test_a_damaged_configuration_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    (folder / "config.yaml").write_bytes(DAMAGE[what])
    for main in (elastic.experiments.evaluate.main, elastic.experiments.train.main):
        code, _, err = command(main, monkeypatch, capsys, f"run={folder}")
        assert code == 1 and err.count("\n") == 1, err
        assert err.startswith(f"error: {folder}/config.yaml ") and "restore it, or train again" in err


@pytest.mark.parametrize("part", ["data", "model"])
def test_a_part_that_names_nothing_is_named(folder: Path, part: str) -> None:
    alter(folder, lambda cfg: cfg[part].update(_tarset_=cfg[part].pop("_target_")))
    with pytest.raises(ElasticError, match=rf"config\.yaml cannot .*: there is no {part}"):
        restore(folder)


def test_what_is_no_callback_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alter(folder, lambda cfg: cfg["callbacks"].update(growth=7))
    code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, f"run={folder}")
    assert (code, err.count("\n")) == (1, 1) and "error: callbacks.growth=7 cannot be" in err


@pytest.mark.parametrize("name", ["model.safetensors", "last.ckpt"])
def test_a_file_of_another_run_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    """Whole in itself, it does not belong here."""
    other = tmp_path / "other"
    train(configure(other, *TINY, "seed=1", "schedule=gates"), other)
    (folder / name).write_bytes((other / name).read_bytes())
    with pytest.raises(FileError, match=f"{name} is (damaged, or )?of another run"):
        restore(folder) if name.startswith("model") else train(load_config(folder), folder)


HOSTILE: dict[str, Any] = {
    "no state": lambda state: state.pop("state_dict"),
    "a state that is none": lambda state: state.update(state_dict=[1, 2]),
    "sizes of words": lambda state: history(state).update(start_sizes={"0": "many"}),
    "no history": lambda state: history(state).clear(),
    "a timeline that is none": lambda state: history(state).update(timeline=7),
    "tensors of other shapes": lambda state: state["state_dict"].update({"net.0.weight": torch.zeros(2)}),
    "an optimizer that is none": lambda state: state.update(optimizer_states=[{"state": 3}]),
    "no loops": lambda state: state.update(loops={"fit_loop": None}),
    "callbacks that are none": lambda state: state["callbacks"].update(Census={"history": 3}),
}


def history(state: dict[str, Any]) -> Any:
    return state["state_dict"]["structure._extra_state"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=[pytest.mark.slow] * (i > 2)) for i, name in enumerate(HOSTILE)]
)
def test_a_checkpoint_that_says_what_cannot_be_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """Without a digest, or with the right one: a digest does not say who has written the file."""
    state = torch.load(folder / "last.ckpt", weights_only=True)
    HOSTILE[what](state)
    torch.save(state, folder / "last.ckpt")
    code, _, err = command(elastic.experiments.train.main, monkeypatch, capsys, f"run={folder}")
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: "), err
    assert "last.ckpt" in err or "the checkpoint" in err, err


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_damaged_summary_is_named(folder: Path, text: str) -> None:
    (folder / "summary.json").write_text(text)
    with pytest.raises(FileError, match=r"summary\.json is damaged: finish the run with run="):
        restore(folder)


def test_what_was_recorded_without_digests_is_read(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary.pop("weights")) == 64
    (folder / "summary.json").write_text(json.dumps(summary))
    state = torch.load(folder / "last.ckpt", weights_only=True)
    assert state["callbacks"].pop("RunMark")
    torch.save(copy.copy(state), folder / "last.ckpt")
    assert restore(folder).summary == summary
    cfg = load_config(folder)
    cfg.run = str(folder)
    assert train(cfg, folder)["test/acc"] == summary["test/acc"]
