"""What the README and the pages of the documentation show works as it stands."""

import pkgutil
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

import elastic
import elastic.callbacks
import elastic.experiments.train
from tests.fitted import command
from tests.runs import configure, without_account

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    """Of code; what has a title is a file."""

    language: str
    title: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.findall(r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    assert 2 * len(found) == text.count("```"), f"{page.name} has a block that is not understood"
    return [Block(*each) for each in found]


def commands(code: str) -> list[list[str]]:
    """The words of each line that is no comment."""
    lines = (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


def write_files(page: Path) -> None:
    for block in (block for block in blocks(page) if block.title):
        path = Path(block.title)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.code)
        sys.modules.pop(path.stem, None)  # another page's


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, whose modules can be imported; pictures of runs have their own tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(elastic.experiments.train, "draw_history", lambda *_: None)
    monkeypatch.syspath_prepend(str(tmp_path))
    without_account(monkeypatch, tmp_path)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_shows_works(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(page)
    names: dict[str, object] = {}
    for block in (block for block in blocks(page) if not block.title):
        if block.language == "python":
            exec(compile(block.code, str(page), "exec"), names)
        elif block.language == "bash":
            shown = [] if page == README else commands(block.code)  # there they take hours
            for python, m, module, *arguments in shown:
                assert (python, m) == ("python", "-m")
                code, _, err = command(import_module(module).main, monkeypatch, capsys, *arguments)
                assert code == 0, f"{module} {arguments}: {err}"
        else:
            assert block.language in ("", "text"), f"nothing tries what is in {block.language}"


def given() -> list[list[str]]:
    """What the README gives to `experiments.train`."""
    lines = [words for block in blocks(README) if block.language == "bash" for words in commands(block.code)]
    return [words[3:] for words in lines if words[1:3] == ["-m", "experiments.train"]]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("arguments", given(), ids=" ".join)
def test_the_readmes_commands_compose(arguments: list[str], tmp_path: Path) -> None:
    write_files(README)
    if "--config-dir" in arguments:
        arguments = [f"hydra.searchpath=[file://{tmp_path / arguments[1]}]", *arguments[2:]]
    overrides = [text for text in arguments if text != "-m" and not text.startswith("run=")]
    swept = OverridesParser.create().parse_overrides(overrides)
    single = [
        f"{o.get_key_element()}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else o.input_line
        for o in swept
    ]
    cfg = configure(tmp_path, *single)
    assert cfg.name == ("mine" if "experiment=mine" in arguments else "digits")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_links_to_exists(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (page.parent / target).exists(), target


def test_the_site_is_complete_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r"<(script|link|img)[^>]* (src|href)=.?(https?:)?//", page.read_text()), page
    for package in (elastic, elastic.callbacks):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            assert f'id="{module.name}"' in (tmp_path / f"api/{module.name}.html").read_text()
