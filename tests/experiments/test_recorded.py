"""Test that recorded runs are in today's words: configurations, summaries, the commands that made them."""

import csv
import functools
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from elastic.data import ImageData
from elastic.experiments.compare import compare_runs
from elastic.experiments.tools.composition import check_words, list_callbacks
from elastic.experiments.tools.summary import SCHEDULE
from tests.runs import configure

ROOT = Path(__file__).parents[2]
RUNS = sorted(path.parent for path in ROOT.glob("experiments/*/*/config.yaml"))
READMES = sorted(ROOT.glob("experiments/*/README.md"))
MADE = re.compile("<!-- begin of .*?<!-- end of [^>]*-->", re.S)  # what commands put into a page


def name(path: Path) -> str:
    return path.relative_to(ROOT / "experiments").as_posix()


@functools.cache
def read(folder: Path) -> DictConfig:
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    return cfg


def test_there_are_recorded_runs() -> None:
    assert len(RUNS) > 100 and len(READMES) > 10


@pytest.mark.slow
def test_every_recorded_network_and_its_data_can_be_made() -> None:
    nets: dict[str, nn.Module] = {}
    for folder in RUNS:
        cfg = read(folder)
        data = instantiate(cfg.data)
        assert isinstance(data, ImageData)
        key = repr((cfg.model, data.shape, data.classes))
        if key not in nets:
            with torch.device("cpu" if "fraction" in cfg.model else "meta"):  # no need for values
                nets[key] = instantiate(cfg.model, in_channels=data.shape[0], classes=data.classes)
            assert isinstance(nets[key], nn.Module)


@pytest.mark.slow
def test_every_recorded_callback_optimizer_and_scheduler_can_be_made() -> None:
    """Each of a kind once: what differs are numbers."""
    made: set[tuple[str, ...]] = set()
    for folder in RUNS:
        cfg = read(folder)
        nodes = {**cfg.callbacks, "optimizer": cfg.optimizer, "lr_scheduler": cfg.lr_scheduler, **cfg.logger}
        for node in (node for part, node in nodes.items() if node is not None and part != "distil"):
            if (kind := (node._target_, *sorted(node))) not in made:
                made.add(kind)
                instantiate(node)


def keys(node: Any) -> dict[str, Any]:
    """The names in a configuration, without its values."""
    return {key: keys(node[key]) if OmegaConf.is_dict(node[key]) else None for key in node}


@pytest.mark.slow
def test_a_recorded_configuration_has_the_names_of_todays(tmp_path: Path) -> None:
    """And no other ones: a run with the same schedule would be described by the same keys today."""
    configurations: dict[tuple[str, ...], DictConfig] = {}
    for folder in RUNS:
        cfg = read(folder)
        methods = tuple(method for method in SCHEDULE if method in list_callbacks(cfg))
        if methods not in configurations:
            given = ["callbacks.magnitude.budget=9"] if "magnitude" in methods else []
            configurations[methods] = configure(tmp_path, f"schedule=[{','.join(methods)}]", *given)
        today = configurations[methods]
        assert set(cfg) == set(today) - {"trust"}, name(folder)  # which none may say of itself
        for method in methods:
            ours, theirs = keys(cfg.callbacks[method]), keys(today.callbacks[method])
            assert set(ours) == set(theirs), name(folder)
            assert ours.get("amount") == theirs.get("amount"), name(folder)


def test_no_recorded_configuration_names_a_place_of_some_machine() -> None:
    places = re.compile(r"(^|[\s'\"])(/|~|[A-Za-z]:\\)")
    assert [name(folder) for folder in RUNS if places.search((folder / "config.yaml").read_text())] == []


@pytest.mark.slow
def test_every_recorded_summary_names_its_schedule() -> None:
    for folder in RUNS:
        summary = json.loads((folder / "summary.json").read_text())
        cfg = read(folder)
        methods = [method for method in SCHEDULE if method in list_callbacks(cfg)]
        assert summary["schedule"] == ("+".join(methods) or "static"), folder
        budget = {key for key in summary if key.startswith("budget/")} - {"budget/reason"}
        assert budget in (set(), {"budget/by", "budget/target", "budget/actual"}), folder


# --- commands -----------------------------------------------------------------------------------------------

# Nothing but `python` can be called, and that only says what it was given.
SHELL = "PATH=/nowhere; python() { printf '%s\\037' \"$@\"; printf '\\n'; }\n"


def commands(readme: Path, folder: Path) -> Iterator[list[str]]:
    """What a README gives to `python`, as a shell has it: loops and variables are expanded."""
    for code in re.findall(r"^```bash\n(.*?)^```$", readme.read_text(), re.DOTALL | re.MULTILINE):
        shell = subprocess.run(
            ["bash", "-c", SHELL + code], cwd=folder, capture_output=True, text=True, check=False
        )
        yield from (line.split("\037")[:-1] for line in shell.stdout.splitlines())


def single(overrides: list[str]) -> tuple[str, ...]:
    """The first run of a sweep."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return tuple(
        f"{o.get_key_element()}={next(o.sweep_string_iterator())}"
        if o.is_sweep_override()
        else str(o.input_line)
        for o in parsed
    )


LONG = (
    "dynamic_pruning",
    "prune_and_grow",
    "growth_pays",
    "controls_mnist",
    "controls_cifar10",
)  # of commands


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "readme",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.parent.name in LONG)) for path in READMES],
    ids=name,
)
def test_the_commands_that_made_a_record_compose(readme: Path, tmp_path: Path) -> None:
    names = {read(folder).name for folder in RUNS if folder.parent == readme.parent}
    composed: set[tuple[str, ...]] = set()
    for python_m, module, *arguments in commands(readme, tmp_path):
        assert python_m == "-m" and module.startswith("experiments.")
        assert (ROOT / "experiments" / f"{module.removeprefix('experiments.')}.py").is_file(), module
        if module != "experiments.train":
            continue
        check_words(arguments)
        said = [word for word in arguments if word != "-m" and not re.match("(run|seed|init)=", word)]
        # What differs by the value of an option composes alike.
        kind = tuple(word.partition("=")[0] if "." in word.partition("=")[0] else word for word in said)
        if kind not in composed:
            composed.add(kind)
            cfg = configure(tmp_path, *single(said))
            assert cfg.name in names


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_the_tables_of_a_record_are_what_their_commands_make(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    page, text = tmp_path / "page.md", readme.read_text()
    page.write_text(
        re.sub(r"(<!-- begin of `elastic compare.*? -->\n).*?(?=<!-- end)", r"\1", text, flags=re.S)
    )
    for _, module, *arguments in commands(readme, tmp_path):
        options = dict(word.split("=", 1) for word in arguments if "=" in word)
        if module == "experiments.compare" and "markdown" in options:
            assert options["markdown"] == f"experiments/{name(readme)}"
            compare_runs(options["runs"], markdown=page, baseline=options.get("baseline"))
    assert page.read_text() == text


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_a_mean_in_the_text_stands_in_a_table_that_a_command_made(readme: Path) -> None:
    texts = [path.read_text() for path in READMES]
    recorded = find_means("".join(table for text in texts for table in MADE.findall(text)))
    for path in readme.parent.glob("serving-*.csv"):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        for server in {row["server"] for row in rows}:
            scores = [100 * float(row["right in time"]) for row in rows if row["server"] == server]
            recorded.add((f"{mean(scores):.2f}", f"{stdev(scores):.2f}"))
    paragraphs = MADE.sub("", readme.read_text()).split("\n\n")
    kept = [text for text in paragraphs if not re.search("commit|not kept", text, re.I)]  # or it says so
    assert find_means("\n\n".join(kept)) <= recorded


def find_means(text: str) -> set[tuple[str, str]]:
    """Find each mean with its spread; '.03' is said for '0.03'."""
    found = re.findall(r"(\d[\d,]*(?:\.\d+)?) ± (\d*(?:\.\d+)?)", text)
    return {(middle, f"0{spread}" if spread.startswith(".") else spread) for middle, spread in found}
