"""What the README shows works as it stands."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.runs import configure

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_its_python_runs() -> None:
    names: dict[str, object] = {}
    for code in blocks("python"):
        exec(code, names)
    assert names["net"].layer1[0].conv1.out_channels == 32  # type: ignore[attr-defined]
    assert len(names["net"].layer3) == 3  # type: ignore[attr-defined]


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True)[3:]
        for line in lines
        if line.startswith("python -m experiments.train")
    ]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_its_commands_compose(command: list[str], tmp_path: Path) -> None:
    given = [text for text in command if text != "-m" and not text.startswith("run=")]
    swept = OverridesParser.create().parse_overrides(given)
    single = [
        f"{o.get_key_element()}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else o.input_line
        for o in swept
    ]
    assert configure(tmp_path, *single).name == "digits"


def test_its_pictures_and_pages_exist() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        assert (Path(__file__).parents[1] / target).exists(), target
