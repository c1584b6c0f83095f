"""Test that commands are found by name, say what they take, and read it by type."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from elastic.errors import OptionError
from elastic.experiments.cli import COMMANDS, main
from elastic.experiments.tools.options import describe, list_options, read_options
from elastic.experiments.tools.training_help import describe_training
from elastic.ranges import Natural, Positive
from tests.runs import CONF

ROOT = Path(__file__).parents[2]
OTHERS = {"__init__", "cli", "cards", "formats", "results"}  # the last three write into this repository
ENTRIES = sorted({path.stem for path in (ROOT / "experiments").glob("*.py")} - OTHERS)
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


def call(patch: Patch, capsys: Capture, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `elastic <words>`."""
    patch.setattr(sys, "argv", ["elastic", *words])
    patch.setenv("HYDRA_FULL_ERROR", "")
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_every_entry_point_is_a_command() -> None:
    assert sorted(COMMANDS) == ENTRIES


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(monkeypatch: Patch, capsys: Capture, name: str) -> None:
    """And does nothing else: a benchmark would take minutes."""
    code, out, err = call(monkeypatch, capsys, name, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: elastic {name}")
    assert all(len(line) <= 132 for line in out.splitlines())
    reads_runs = (
        any(f"\n  {option}= " in out for option in ("run", "runs")) and name != "plan"
    )  # it makes them
    assert ("trust=" in out) == reads_runs


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands(monkeypatch: Patch, capsys: Capture, words: tuple[str, ...]) -> None:
    code, out, _ = call(monkeypatch, capsys, *words)
    assert code == 0 and all(f"  {name} " in out for name in COMMANDS)


def test_modules_in_the_folder_that_a_command_is_called_in_are_found(
    monkeypatch: Patch, capsys: Capture, tmp_path: Path
) -> None:
    """As with `python -m`; a console script has its own folder in front."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    call(monkeypatch, capsys, "evaluate", "--help")
    assert sys.path[0] == str(tmp_path)


def test_help_of_training_names_every_choice() -> None:
    text = re.sub(r"\n {17}", " ", describe_training())  # long lines are broken
    for group in (
        "task",
        "data",
        "model",
        "schedule",
        "optimizer",
        "lr_scheduler",
        "logger",
        "trigger",
        "experiment",
    ):
        (line,) = (line for line in text.splitlines() if line.startswith(f"  {group}="))
        assert all(path.stem in line for path in (CONF / group).glob("*.yaml"))
    assert "[digits]" in text and "[growth]" in text and "  label_smoothing= " in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("evalute",), "there is no command 'evalute': did you mean evaluate?"),
        (("nonsense",), "there is no command 'nonsense': choose train, plan, "),
        (("evaluate",), "name run=…: see --help"),
        (("evaluate", "run=x", "colour=1"), "there is no option colour=1; there are: run=…, level=…, set=…"),
        (("evaluate", "x"), "there is no option x; "),
        (("evaluate", "run=x", "levels=1"), "there is no option levels=1: did you mean level=…?"),
        (("evaluate", "run="), "run= says nothing: set run"),
        (("compare", "runs="), "runs= says nothing: set runs"),
        (("compare", "runs=x", "csv="), "csv= is no path: set csv to one"),
        (
            ("compare", "runs=x", "html=/nonexistent/x.html"),
            "/nonexistent/x.html cannot be written: make the",
        ),
        (("sensitivity", "run=x", "figure=/nonexistent/x.png"), "/nonexistent/x.png cannot be written: make"),
        *(
            ((command, "run=x", "csv=/nonexistent/x.csv"), "/nonexistent/x.csv cannot be written: make")
            for command in ("latency", "usage", "sensitivity", "serve")
        ),
        (("load_test", "source=x", "csv=/nonexistent/x.csv"), "/nonexistent/x.csv cannot be written: make"),
        *(
            ((*words, "figure=x.doc"), "x.doc cannot be a picture: end its name in one of")
            for words in (
                ("compare", "runs=x"),
                ("sensitivity", "run=x"),
                ("serve", "run=x"),
                ("usage", "run=x"),
            )
        ),
        (("evaluate", f"run={__file__}"), f"{__file__} is a file: name the folder of a finished run"),
        (("plan", "file=x", "trust=[y]"), "there is no option trust=[y]; there are: file=…, runs=…, "),
        (("evaluate", "run=/nonexistent"), "/nonexistent/config.yaml is missing"),
        (("evaluate", "run=x", "level=last"), "level=last is no whole number: set level to one"),
        (("switching", "run=x"), "there is no option run=x; there are: none"),
    ],
)
def test_what_is_wrong_is_one_line(
    monkeypatch: Patch, capsys: Capture, words: tuple[str, ...], said: str
) -> None:
    code, out, err = call(monkeypatch, capsys, *words)
    assert (code, out) == (1, "") and err.count("\n") == 1 and err.startswith(f"error: {said}")


def example(
    run: Path,
    level: Natural | None = None,
    deadline: Positive = 1.3,
    html: Path | None = None,
    again: bool = False,
    name: str = "",
) -> None:
    """Do nothing: a command has a summary, which may need
    two lines.

    More is not shown.

    Args:
        run: a folder,
            described at length.
        level, deadline: numbers.

    Raises:
        OptionError: never.
    """


def test_options_are_read_by_their_type(monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    words = ("run=~/a=b", "level=2e3", "deadline=2", "html=null", "again=true", "name=2")
    assert read_options(example, words) == {
        "run": Path("/home/someone/a=b"),
        "level": 2000,
        "deadline": 2.0,
        "html": None,
        "again": True,
        "name": "2",
    }
    assert isinstance(read_options(example, words)["deadline"], float)
    assert read_options(example, ("run=x",)) == {"run": Path("x")}, "the function has its own defaults"


@pytest.mark.parametrize(
    "word", ["level=1.5", "level=", "level=inf", "deadline=soon", "deadline=null", "again=1", "again=maybe"]
)
def test_a_value_of_another_type_is_refused(word: str) -> None:
    with pytest.raises(OptionError, match=rf"^{word.replace('.', r'[.]')} is no "):
        read_options(example, ("run=x", word))


@pytest.mark.parametrize("word", ["level=-1", "deadline=0", "deadline=nan", "deadline=inf"])
def test_a_value_out_of_its_range_is_refused(word: str) -> None:
    with pytest.raises(OptionError, match=r"cannot be: set it to .*(0 or more|above 0)"):
        read_options(example, ("run=x", word))


def test_a_description_has_the_types_the_defaults_and_the_docstrings_words() -> None:
    options = list_options(example)
    assert options["run"].help == "a folder, described at length."
    assert options["level"].help == options["deadline"].help == "numbers."
    text = describe(example, "elastic example")
    assert "usage: elastic example run=… [level=…]" in text and "More is not shown" not in text
    assert "a command has a summary, which may need two lines." in text
    assert "number (1.3)" in text and "true or false (false)" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described(name: str) -> None:
    module = import_module(f"elastic.experiments.{name}")
    source = Path(str(module.__file__)).read_text()
    if name == "train":
        return
    function = source.split("call(")[1].split(")")[0]
    assert all(option.help for option in list_options(getattr(module, function)).values())


def test_help_comes_before_torch_is_there() -> None:
    """As the console script has it, which imports the package first."""
    heavy = ("torch", "lightning", "matplotlib", "wandb")
    code = (
        "import sys; sys.argv = ['elastic', 'train', '--help']\n"
        "from elastic.experiments.cli import main; main()\n"
        f"sys.exit(any(name in sys.modules for name in {heavy}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: elastic train"), done.stderr


@pytest.mark.slow
def test_output_that_nobody_reads_is_no_error() -> None:
    words = f"{sys.executable} -m experiments.cli train --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.startswith("usage") and done.stderr == "" and done.returncode in (0, 141)
