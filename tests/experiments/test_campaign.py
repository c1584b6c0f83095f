"""A campaign finds what is broken: each part holds as the code is, and fails where a fault is put in."""

import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from elastic.errors import OptionError, TrainingError
from elastic.experiments import campaign
from elastic.experiments.campaign import run_campaign, try_part
from elastic.experiments.tools.trials import Part, forks, kills, moments, options, structure
from elastic.experiments.tools.trials.programs import make_programs
from elastic.experiments.train import train
from elastic.files.atomic import write_atomically
from elastic.training import checkpoints


def carry_out(name: str, trials: int, folder: Path, seed: int = 0) -> Part:
    part = Part(name, campaign.CLAIMS[name])
    folder.mkdir(exist_ok=True)
    try_part(part, trials, Random(seed), folder)
    return part


TRIALS = {"options": 16, "structure": 8, "files": 60}


@pytest.mark.parametrize("name", ["options", "structure", pytest.param("files", marks=pytest.mark.slow)])
def test_nothing_is_lost(tmp_path: Path, name: str) -> None:
    part = carry_out(name, TRIALS[name], tmp_path / name)
    assert not part.faults and TRIALS[name] - 5 <= part.trials <= TRIALS[name]
    assert sum(part.outcomes.values()) == part.trials and len(part.outcomes) > 1


# torch's, of speed alone: kernels of one by one pixels have strides that mean the same. A fork fails by it.
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", campaign.TRIALS)
def test_nothing_is_lost_in_many(tmp_path: Path, name: str) -> None:
    trials = max(campaign.TRIALS[name][0] // 4, 11)  # a kill of each program
    assert not carry_out(name, trials, tmp_path / name, seed=5).faults


@pytest.mark.slow
def test_a_seed_draws_the_same(tmp_path: Path) -> None:
    one, two = (carry_out("structure", 8, tmp_path / name, seed=3).outcomes for name in "ab")
    assert one == two


def test_options_that_nobody_checks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cfg: Any) -> None:
        raise KeyError("a fault of the code")

    monkeypatch.setattr(options, "check_options", fail)
    part = Part("options", "")
    options.try_options(part, 3, Random(0), tmp_path)
    assert len(part.faults) == 3 and "KeyError" in part.faults[0]


def test_outputs_that_change_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(subject: structure.Subject) -> None:
        with torch.no_grad():
            next(subject.net.parameters()).mul_(1.5)

    monkeypatch.setattr(structure, "KEEPING", dict.fromkeys(structure.KEEPING, spoil))
    monkeypatch.setattr(structure, "ALTERING", {})
    part = Part("structure", "")
    structure.try_structure(part, 4, Random(0), tmp_path)
    assert len(part.faults) == 4 and "outputs differ" in part.faults[0]


@pytest.mark.slow
def test_damage_that_is_read_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "is_intact", lambda content: True)
    part = carry_out("files", 80, tmp_path / "files")
    assert part.faults and all(fault.startswith("last.ckpt") for fault in part.faults)


@pytest.mark.slow
def test_a_run_that_comes_back_as_another_is_found(tmp_path: Path) -> None:
    """A run that begins anew where it should go on, with what has changed meanwhile."""

    def train_otherwise(cfg: Any, folder: Path) -> None:
        if (folder / "last.ckpt").exists() and not (folder / "summary.json").exists():
            (folder / "last.ckpt").unlink()
            cfg.seed = 7
        train(cfg, folder)

    part = Part("kills", "")
    program = make_programs(train_otherwise, 0, tmp_path)["growth+gates"]
    kills.try_program(part, program, 12, 0, tmp_path / "trials")
    assert part.trials == 12 and part.faults and "another" in part.faults[0]


@pytest.mark.slow
def test_a_program_in_which_nothing_happens_is_found(tmp_path: Path) -> None:
    program = make_programs(train, 0, tmp_path)["growth+gates"]
    part = Part("kills", "")
    idle = replace(program, fault=lambda folder: "it has not grown")
    kills.try_program(part, idle, 5, 0, tmp_path / "trials")
    assert part.trials == 1 and "it has not grown" in part.faults[0]


def test_moments_are_told_and_half_of_a_write_is_left(tmp_path: Path) -> None:
    """Each is tried in a process of its own: there is no way back from watching."""
    folder, copies = tmp_path / "run", tmp_path / "copies"

    def write() -> None:
        moments.watch_moments(folder, moments.copy_moments(folder, copies, Random(0)))
        write_atomically(folder / "a", lambda part: part.write_text("abc" * 99))
        (folder / "b").write_text("in place")

    folder.mkdir()
    assert forks.run_in_fork(write) == 0
    left = [
        {re.sub(r"\.\d+", "", file.name): file.stat().st_size for file in copy.iterdir()}
        for copy in sorted(copies.iterdir())
    ]
    assert [set(files) for files in left] == [set(), {"a.part"}, {"a.part"}, {"a.part"}, {"a"}, {"a"}]
    assert [files["a.part"] < 297 for files in left[1:4]] == [True, True, False]

    def fill() -> None:
        moments.watch_moments(folder, moments.refuse_writes(1, 28, Random(0)))
        write_atomically(folder / "a", lambda part: part.write_text("new"))

    said = tmp_path / "said"
    assert forks.run_in_fork(fill, said) == 1 and "No space left" in said.read_text()
    assert (folder / "a").read_text() == "abc" * 99


def test_the_page_says_what_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(part: Part, *_: Any) -> None:
        part.count("as it must be")
        if part.name == "files":
            part.fail("a bit\nof it")

    monkeypatch.setattr(campaign, "try_part", lose)
    page, results = tmp_path / "page.md", tmp_path / "results"
    with pytest.raises(TrainingError, match=r"1 trials have failed: .*page"):
        run_campaign(seed=3, scale=0.5, to=page, results=results)
    text = page.read_text()
    assert "- files: `a bit of it`" in text and "ARGS='only=files seed=3 scale=0.5'" in text
    assert text.count("| as it must be | 1 |") == len(campaign.TRIALS)


def test_a_part_brings_the_page_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "try_part", lambda part, *_: part.count("well", 3))
    page, results = tmp_path / "page.md", tmp_path / "results"
    run_campaign(only="kills,files", to=page, results=results)
    run_campaign(seed=1, only="kills", full=True, to=page, results=results)
    text = page.read_text()
    assert text.count("| well | 3 |") == 2 and text.index("| files | n") < text.index("| kills | t")
    assert "ARGS='only=kills seed=1 full=true'" in text and "ARGS='only=files seed=0'" in text
    with pytest.raises(OptionError, match="there is no part nonsense of a campaign"):
        run_campaign(only="nonsense", to=page, results=results)


def test_the_page_names_no_folder_of_the_machine() -> None:
    said = """File "/home/me/lib/inspect.py", line 1: a/b and 3/4 of '/tmp/x/y' are '1 / 2'"""
    assert (
        campaign.leave_out_folders(said)
        == """File "…/inspect.py", line 1: a/b and 3/4 of '…/y' are '1 / 2'"""
    )
