"""Run what the README and the pages of the documentation show, and assert what it did."""

import html
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import elastic
import elastic.experiments.cli
import elastic.experiments.train
from tests.fitted import command
from tests.runs import configure, without_account

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
# In the default suite one page stands for each kind of block. These cost more, or are of a kind with others.
SLOW = """
    callback data dynamic ema_distil export gates growth levels run schedule sweeps""".split()
DOWNLOADED = ("mnist", "fashion_mnist", "cifar10", "cifar100", "imagenette")
LIBRARY = ("growth", "resolution", "gates", "magnitude", "ema", "joint", "reconstruct", "dynamic", "distil")
Summary = dict[str, Any]


class Block(NamedTuple):
    """Hold a block of code; one with a title is a file."""

    language: str
    title: str
    code: str


def name_page(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read_blocks(page: Path) -> list[Block]:
    """Read the blocks of a page."""
    text = page.read_text()
    matches = re.findall(r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    assert 2 * len(matches) == text.count("```"), f"{page.name} has a block that cannot be read"
    return [Block(*match) for match in matches]


def split_commands(code: str) -> list[list[str]]:
    """Split a block into the words of each line that is no comment."""
    lines = (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


def list_commands(page: Path) -> list[list[str]]:
    blocks = (block for block in read_blocks(page) if block.language == "bash")
    return [words for block in blocks for words in split_commands(block.code)]


def write_files(page: Path) -> None:
    """Write the files that a page shows where it says."""
    for block in (block for block in read_blocks(page) if block.title):
        path = Path(block.title)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.code)
        sys.modules.pop(path.stem, None)  # another page's


# --- what a training command has to do, read off its words --------------------------------------------


def read_overrides(words: Sequence[str]) -> dict[str, str]:
    return dict(word.lstrip("+").split("=", 1) for word in words if "=" in word and not word.startswith("~"))


def read_experiment(name: str, folder: Path | None) -> Mapping[str, Any]:
    """Read the file of an experiment, of the user's folder or of this project."""
    places = [base / "experiment" / f"{name}.yaml" for base in (folder, ROOT / "conf") if base is not None]
    content: Mapping[str, Any] = yaml.safe_load(next(p for p in places if p.exists()).read_text())
    return content


def expect(words: Sequence[str]) -> Summary:
    """Say what the summary of a run has to hold: the defaults, its experiment's file, its command line."""
    given = read_overrides(words)
    expected: Summary = {"data": "digits", "model": "convnet", "schedule": ["growth", "gates"], "seed": 0}
    expected |= {"epochs": 60, "experiment": None, "budget/target": None}
    if "experiment" in given:
        folder = Path(words[words.index("--config-dir") + 1]) if "--config-dir" in words else None
        content = read_experiment(given["experiment"], folder)
        for line in content.get("defaults", ()):
            expected |= {key.removeprefix("override /"): value for key, value in line.items()}
        expected["experiment"] = content["name"]
        expected["epochs"] = content.get("trainer", {}).get("max_epochs", 60)
        budget = content.get("callbacks", {}).get("gates", {}).get("budget")
        expected["budget/target"] = budget["target"] if isinstance(budget, dict) else budget
    expected |= {key: given[key] for key in ("data", "model") if key in given}
    if "schedule" in given:
        expected["schedule"] = given["schedule"].strip("[]").split(",")
    expected["epochs"] = int(given.get("trainer.max_epochs", expected["epochs"]))
    expected["epochs"] = 1 if given.get("debug") == "batch" else expected["epochs"]
    expected["seed"] = int(given.get("seed", 0))
    budgets = [int(given[f"callbacks.{key}.budget"]) for key in LIBRARY if f"callbacks.{key}.budget" in given]
    expected["budget/target"] = budgets[0] if budgets else expected["budget/target"]
    expected["experiment"] = (
        given.get("name") or expected["experiment"] or "{data}-{model}".format(**expected)
    )
    return expected


def assert_trained(summary: Summary, words: Sequence[str]) -> None:
    """Assert that a run was of the data, model, schedule, epochs, seed, name and budget of its command."""
    expected = expect(words)
    methods = [name for name in expected.pop("schedule") if name in LIBRARY]
    schedule = summary["schedule"].split("+")
    assert set(schedule) - {"static"} == set(methods), words
    assert {key: summary.get(key) for key in expected} == expected, words
    assert 0 <= summary["test/acc"] <= 1 and summary["params"] > 0


def expand_sweep(words: Sequence[str]) -> list[list[str]]:
    """Expand the values of a sweep, of its command line or its file, into a command for each run."""
    given, runs = read_overrides(words), [[word for word in words if word != "-m"]]
    values: dict[str, Any] = {key: value for key, value in given.items()}
    if "sweep" in given and given["sweep"] != "search":
        path = Path(words[words.index("--config-dir") + 1], "sweep", f"{given['sweep']}.yaml")
        content = yaml.safe_load(path.read_text())
        values |= {"trainer.max_epochs": str(content["trainer"]["max_epochs"])}
        values |= content["hydra"]["sweeper"]["params"]
    for key, value in values.items():
        choices = re.split(r",(?![^\[]*\])", value)
        runs = [[*run, f"{key}={choice}"] for run in runs for choice in choices]
    return runs * int(given.get("hydra.sweeper.n_trials", 1))


# --- running ---------------------------------------------------------------------------------------


def read_summaries() -> dict[Path, tuple[int, Summary]]:
    paths = sorted(Path().glob("*/**/summary.json"))
    return {path.parent: (path.stat().st_mtime_ns, json.loads(path.read_text())) for path in paths}


def run_train(words: Sequence[str], call: Callable[..., str]) -> None:
    """Run a training command, and assert what each of its runs did."""
    before = read_summaries()
    call("train", *words)
    after = read_summaries()
    changed = {
        folder: summary for folder, (time, summary) in after.items() if before.get(folder, (0,))[0] != time
    }
    given = read_overrides(words)
    folder = Path(given.get("run", "."))
    if "-m" in words:
        runs = expand_sweep(words)
        if not changed:  # a sweep that has been done
            changed = {
                folder: summary for folder, (_, summary) in after.items() if "multirun" in folder.parts
            }
            changed = {f: s for f, s in changed.items() if given.get("sweep", "") in f.as_posix()}
        assert len(changed) == len(runs), words
        if given.get("sweep") != "search":
            key = lambda summary: (summary["seed"], summary["params_dense"])  # noqa: E731
            for run, summary in zip(runs, sorted(changed.values(), key=key), strict=True):
                assert_trained(summary, run)
    elif folder in before and set(given) == {"run"}:  # a run that is continued
        assert changed[folder]["epochs"] == before[folder][1]["epochs"]
        assert changed[folder]["test/acc"] == before[folder][1]["test/acc"]
    else:
        ((place, summary),) = changed.items()
        assert place == folder or folder == Path(), words
        assert_trained(summary, words)


def check_evaluate(out: str, given: Mapping[str, str]) -> None:
    summary = json.loads(Path(given["run"], "summary.json").read_text())
    if "level" in given:
        summary |= summary["levels"][int(given["level"])]
    measured = json.loads(out.strip().splitlines()[-1])
    assert measured["test/acc"] == pytest.approx(summary["test/acc"])
    assert measured["params"] == summary["params"]


def check_files(out: str, given: Mapping[str, str]) -> None:
    """Assert that what a command is asked to write is there."""
    for key in {"to", "csv", "figure", "html", "json", "markdown", "classes"} & set(given):
        assert Path(given[key]).stat().st_size > 100, given


CHECKS: dict[str, Callable[[str, Mapping[str, str]], None]] = {"evaluate": check_evaluate}


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Call commands in an empty folder whose modules can be imported; figures have tests of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    without_account(monkeypatch, tmp_path)

    def call_command(name: str, *arguments: str) -> str:
        main = elastic.experiments.cli.run_command
        code, out, err = command(main, monkeypatch, capsys, name, *arguments)
        assert code == 0, f"{name} {arguments}: {err}"
        return out

    yield call_command


def run_command(words: Sequence[str], call: Callable[..., str]) -> None:
    program, name, *arguments = words
    assert program == "elastic", words
    given = read_overrides(arguments)
    if name == "train" and given.get("data") in DOWNLOADED:
        return  # composed below, and trained where the data are
    if name == "train":
        run_train(arguments, call)
    else:
        out = call(name, *arguments)
        assert out
        CHECKS.get(name, check_files)(out, given)


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] if p.stem in SLOW else [], id=name_page(p)) for p in PAGES],
)
def test_what_a_page_shows_works(page: Path, call: Callable[..., str]) -> None:
    write_files(page)
    names: dict[str, object] = {}
    for block in (block for block in read_blocks(page) if not block.title):
        if block.language == "python":
            exec(compile(block.code, str(page), "exec"), names)
        elif block.language == "bash" and page != README:
            for words in split_commands(block.code):
                run_command(words, call)
        else:
            assert block.language in ("", "text") or page == README, f"nothing runs {block.language}"


def list_downloaded() -> list[list[str]]:
    commands = [words[2:] for page in PAGES for words in list_commands(page) if words[1] == "train"]
    return [words for words in commands if read_overrides(words).get("data") in DOWNLOADED]


@pytest.mark.parametrize("words", list_downloaded(), ids=" ".join)
def test_commands_on_downloaded_data_mean_what_they_say(words: list[str], tmp_path: Path) -> None:
    expected, cfg = expect(words), configure(tmp_path, *words)
    assert (cfg.name, cfg.trainer.max_epochs) == (expected["experiment"], expected["epochs"])
    assert (cfg.choices.data, cfg.choices.model) == (expected["data"], expected["model"])
    assert cfg.callbacks.gates.budget == expected["budget/target"]


@pytest.mark.data
@pytest.mark.parametrize("words", list_downloaded(), ids=" ".join)
def test_commands_on_downloaded_data_train(words: list[str], call: Callable[..., str]) -> None:
    run_train([*words, "debug=batch"], call)


# --- the README --------------------------------------------------------------------------------------


def test_the_readme_is_of_one_screen() -> None:
    assert len(README.read_text().split()) <= 700


def test_the_demo_is_the_one_that_the_readme_tells_of(tmp_path: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "--no-print-directory", "demo"]
    make = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=plain)
    words = shlex.split(make.stdout.strip().splitlines()[-1])
    cfg = configure(tmp_path, *(word for word in words if "=" in word))
    assert (cfg.name, cfg.choices.data, cfg.trainer.max_epochs) == ("digits", "digits", 120)
    assert cfg.callbacks.gates.budget == 2000


# --- the site ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name_page)
def test_what_a_page_links_to_exists(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (page.parent / target).exists(), target


def test_names_of_the_library_on_the_pages_exist() -> None:
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for name in re.findall(r"`(elastic(?:\.\w+)+)`", prose):
            module, _, attribute = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ImportError:
                assert hasattr(importlib.import_module(module), attribute), f"{page.name}: {name}"


def test_the_page_on_runs_lists_every_choice() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "docs/run.md").read_text(), re.MULTILINE)
    choices = {part: set(re.findall(r"\w+", " ".join(re.findall("`(.+?)`", row)))) for part, row in rows}
    for folder in (path for path in (ROOT / "conf").iterdir() if path.is_dir()):
        if folder.name not in ("callbacks", "hydra"):
            assert {path.stem for path in folder.glob("*.yaml")} <= choices[folder.name], folder


def test_options_on_the_pages_exist() -> None:
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for name, options in re.findall(r"`callbacks\.(\w+)\.([\w.]+)[`=]", prose):
            node = yaml.safe_load((ROOT / "conf/schedule" / f"{name}.yaml").read_text())[name]
            for option in options.split("."):
                assert node is None or option in node, f"{page.name}: callbacks.{name}.{options}"
                node = node and node[option]


def test_tables_fit_beside_the_navigation() -> None:
    """In 960 of 1280 pixels, of 8 a character; a cell breaks its lines between words, and code anywhere."""
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for table in re.findall(r"(?:^\|.+\|\n)+", prose, re.MULTILINE):
            texts = re.sub(r"\]\(.*?\)", "", table)
            rows = [line.strip("|").split("|") for line in texts.splitlines() if "---" not in line]
            widths = [
                max(max(map(len, cell.split()), default=0) for cell in column)
                for column in zip(*rows, strict=True)
            ]
            assert sum(min(width, 45) + 4 for width in widths) <= 120, f"{page.name}: {rows[0]}"


def test_the_navigation_has_every_page() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_complete_and_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r"<(script|link|img)[^>]* (src|href)=.?(https?:)?//", page.read_text()), page
    for folder, prefix in ((ROOT / "elastic", ""), (ROOT / "callbacks", "elastic.")):
        for path in folder.rglob("[!_]*.py"):
            name = prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if "._" not in name:
                assert f'id="{name}"' in (site / f"api/{name}.html").read_text()


@pytest.mark.slow
def test_the_site_can_be_searched(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text())
    texts = [entry["text"] + entry["title"] for entry in index["docs"]]
    assert any("kernel activation module" in html.unescape(text) for text in texts)
