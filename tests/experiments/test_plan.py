"""Plans: what waits for what, what goes on, what is left alone, and what becomes of a failure."""

import json
import sys
from pathlib import Path

import pytest

from elastic.errors import OptionError, TrainingError
from elastic.experiments import plan
from elastic.experiments.plan import TRAIN
from tests.fitted import command

PLAN = """
common: [a=1]
arms:
  question/child: {seeds: [0, 1], options: ["init={runs}/question/parent-seed{seed}"]}
  question/parent: {seeds: [0, 1], options: [b=2]}
  other/alone: {seeds: [0], options: [c=3, "trust=[mine]"]}
"""
# Notes when it begins and ends; fails where its options say so.
TRAINER = """
import json, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
folder = Path(words["run"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "begun").write_text(str(time.monotonic()))
(folder / "words").write_text(json.dumps(sys.argv[1:]))
if "fail" in words:
    sys.exit(3)
time.sleep(0.1)
(folder / "summary.json").write_text(json.dumps({"test/acc": 0.5, "params": 7, "wall_s": 0.1}))
(folder / "ended").write_text(str(time.monotonic()))
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    trainer = tmp_path / "trainer.py"
    trainer.write_text(TRAINER)
    monkeypatch.setattr(plan, "TRAIN", (sys.executable, str(trainer)))
    monkeypatch.setattr(plan, "POLL_S", 0.01)
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


def read(folder: Path, name: str) -> float:
    return float((folder / name).read_text())


def test_runs_wait_for_what_they_start_from_and_have_their_options(file: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    plan.carry_out(file, runs, workers=4)
    for seed in (0, 1):
        parent, child = (runs / f"question/{arm}-seed{seed}" for arm in ("parent", "child"))
        assert read(parent, "ended") <= read(child, "begun")
        words = json.loads((child / "words").read_text())
        assert words == [f"seed={seed}", "a=1", f"init={parent}", f"run={child}"]
    # Side by side: nothing keeps one from beginning before another has ended.
    first, other = runs / "question/parent-seed0", runs / "other/alone-seed0"
    assert read(other, "begun") < read(first, "ended")


def test_the_same_plan_again_carries_out_the_rest(file: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    plan.carry_out(file, runs, only="question/parent")
    begun = read(runs / "question/parent-seed0", "begun")
    started = runs / "other/alone-seed0"
    started.mkdir(parents=True)
    (started / "last.ckpt").touch()
    plan.carry_out(file, runs)
    assert read(runs / "question/parent-seed0", "begun") == begun
    assert json.loads((started / "words").read_text()) == ["trust=[mine]", f"run={started}"]


def test_what_starts_from_a_failure_is_left_out_and_the_rest_is_trained(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(PLAN.replace("b=2", "fail=1"))
    with pytest.raises(TrainingError, match="4 of 5 runs have failed"):
        plan.carry_out(file, tmp_path / "runs", workers=2)
    assert (tmp_path / "runs/other/alone-seed0/summary.json").exists()
    assert not (tmp_path / "runs/question/child-seed0").exists()
    assert "question/child-seed0: left out" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_wrong_with_a_run_is_one_line_of_its_log(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "TRAIN", TRAIN)
    file.write_text("arms: {a/b: {seeds: [0], options: [trainer.epochs=3]}}")
    code, _, err = command(plan.main, monkeypatch, capsys, f"file={file}", f"runs={tmp_path / 'runs'}")
    assert code == 1 and "1 of 1 runs have failed, a/b-seed0" in err
    (line,) = (tmp_path / "runs/a/b-seed0.log").read_text().splitlines()
    assert line.startswith("error: there is no option trainer.epochs")


@pytest.mark.parametrize(
    ("text", "only", "reason"),
    [
        ("", "*", "is no plan, it is nothing: write a mapping of common and arms"),
        ("[1, 2]", "*", r"is no plan, it is \[1, 2\]: write a mapping"),
        ("a: [", "*", r"is no plan \(.*\): see elastic plan --help"),
        ("{}", "*", "arms is no plan, it is nothing"),
        ("{arms: [a, b]}", "*", r"arms is no plan, it is \['a', 'b'\]: write a mapping of names"),
        ("arms: {1: {seeds: [0], options: []}}", "*", "names, in quotes where they are numbers"),
        ("arms: {a: [b=1]}", "*", "a is no plan, .* a mapping of seeds and options"),
        ("arms: {a: {seed: [0], options: []}}", "*", "it has 'seed': write seeds and options alone"),
        ("arms: {a: {seeds: 3, options: []}}", "*", r"seeds of a cannot be 3: write a list such as \[0, 1\]"),
        ("arms: {a: {seeds: [x], options: []}}", "*", "seeds of a cannot be"),
        ("arms: {a: {seeds: [0]}}", "*", "options of a cannot be nothing: write a list"),
        ("arms: {a: {seeds: [0], options: b=1}}", "*", "options of a cannot be 'b=1': write a list"),
        ("arms: {a: {seeds: [0], options: [b: 1]}}", "*", r"options of a cannot be \[{'b': 1}\]"),
        ("{common: b=1, arms: {}}", "*", "common cannot be 'b=1'"),
        (
            "arms: {a: {seeds: [0], options: ['init={nowhere}']}}",
            "*",
            "a has init={nowhere}, where {seed} and {runs}",
        ),
        ("arms: {a: {seeds: [0], options: ['b={4}', 'c={']}}", "*", r"a has b=\{4\}, where {seed}"),
        ("arms: {a: {seeds: [0], options: ['init={runs}/b-seed0']}}", "*", "which is no run of the plan"),
        (PLAN, "elsewhere/*", "has no arm"),
    ],
)
def test_what_is_no_plan_is_refused(file: Path, tmp_path: Path, text: str, only: str, reason: str) -> None:
    file.write_text(text)
    with pytest.raises(OptionError, match=reason) as error:
        plan.carry_out(file, tmp_path / "runs", only=only)
    assert "\n" not in str(error.value)


def test_runs_that_wait_for_each_other_are_named(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "arms:\n  a: {seeds: [0], options: ['init={runs}/b-seed0']}\n"
        "  b: {seeds: [0], options: ['init={runs}/a-seed0']}\n"
    )
    with pytest.raises(OptionError, match="a-seed0, b-seed0 start from each other"):
        plan.run_side_by_side(plan.read_plan(file, tmp_path), 1)
