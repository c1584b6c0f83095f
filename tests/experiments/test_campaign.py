"""A campaign finds what is broken: each part holds as the code is, and fails where a fault is put in."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from elastic.errors import TrainingError
from elastic.experiments import campaign
from elastic.experiments.campaign import compose_run, run_campaign, try_part
from elastic.experiments.tools.trials import Part, kills, options, structure
from elastic.experiments.train import train
from elastic.training import checkpoints


def carry_out(name: str, trials: int, folder: Path, seed: int = 0) -> Part:
    part = Part(name, campaign.CLAIMS[name])
    folder.mkdir(exist_ok=True)
    try_part(part, trials, Random(seed), folder)
    return part


TRIALS = {"options": 12, "structure": 8, "files": 60}


@pytest.mark.parametrize("name", TRIALS)
def test_nothing_is_lost(tmp_path: Path, name: str) -> None:
    part = carry_out(name, TRIALS[name], tmp_path / name)
    assert not part.faults and TRIALS[name] - 5 <= part.trials <= TRIALS[name]
    assert sum(part.outcomes.values()) == part.trials and len(part.outcomes) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", campaign.TRIALS)
def test_nothing_is_lost_in_many(tmp_path: Path, name: str) -> None:
    assert not carry_out(name, campaign.TRIALS[name] // 4, tmp_path / name, seed=5).faults


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
    kills.try_kills(part, 6, Random(1), compose_run(tmp_path), train_otherwise, tmp_path)
    assert part.trials == 6 and part.faults and "another" in part.faults[0]


def test_the_page_says_what_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(part: Part, *_: Any) -> None:
        part.count("as it must be")
        if part.name == "files":
            part.fail("a bit\nof it")

    monkeypatch.setattr(campaign, "try_part", lose)
    page = tmp_path / "page.md"
    with pytest.raises(TrainingError, match=r"1 trials have failed: .*page"):
        run_campaign(seed=3, scale=0.5, to=page)
    text = page.read_text()
    assert "- files: `a bit of it`" in text and "ARGS='seed=3 scale=0.5'" in text
    assert text.count("| as it must be | 1 |") == 4
