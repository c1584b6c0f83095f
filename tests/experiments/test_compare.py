"""The table of many runs against numpy."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from elastic.errors import TrainingError
from elastic.experiments import compare


def write(folder: Path, accuracy: float, params: int, **more: Any) -> None:
    folder.mkdir()
    summary = {"test/acc": accuracy, "params": params, "params_dense": 9, "macs": 7, "wall_s": 1.5, **more}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_mean_and_sd_by_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    accuracies = [0.91, 0.95, 0.93]
    for seed, accuracy in enumerate(accuracies):
        write(tmp_path / f"grown-seed{seed}", accuracy, 100 + seed)
    write(tmp_path / "dense-seed0", 0.5, 1000)
    (tmp_path / "grown-seed9").mkdir()  # unfinished
    monkeypatch.setattr(sys, "argv", ["compare", f"runs={tmp_path}/*", f"csv={tmp_path}/results.csv"])
    compare.main()
    shown = capsys.readouterr().out
    mean, sd = 100 * np.mean(accuracies), 100 * np.std(accuracies, ddof=1)
    assert f"{mean:.2f} ± {sd:.2f}" in shown and "50.00 ± " not in shown, "of one run there is no sd"
    rows = {r["arm"]: r for r in csv.DictReader((tmp_path / "results.csv").read_text().splitlines())}
    assert rows.keys() == {"grown", "dense"} and rows["grown"]["runs"] == "3"
    assert float(rows["grown"]["test/acc sd"]) == pytest.approx(sd, rel=1e-5)


def shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[dict[str, list[str]], dict[str, dict[str, str]]]:
    """The table's cells and the file's, by arm."""
    monkeypatch.setattr(sys, "argv", ["compare", f"runs={folder}/*", f"csv={folder}/results.csv"])
    compare.main()
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines()]
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines if line}
    rows = csv.DictReader((folder / "results.csv").read_text().splitlines())
    return cells, {row["arm"]: row for row in rows}


def test_training_macs_are_shown_in_units_of_1e12(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for seed, macs in enumerate((1_500_000_000_000, 2_500_000_000_000)):
        write(tmp_path / f"new-seed{seed}", 0.9, 10, macs_training=macs)
    cells, rows = shown(tmp_path, monkeypatch, capsys)
    assert "2.000 ± 0.707" in cells["new"]
    assert float(rows["new"]["macs_training mean"]) == 2
    assert float(rows["new"]["macs_training sd"]) == pytest.approx(0.5**0.5, rel=1e-5)


def test_sets_of_modules_are_arms_and_have_mean_macs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path / "dense-seed0", 0.95, 10, macs_dynamic=7)
    _, rows = shown(tmp_path, monkeypatch, capsys)
    assert "macs_dynamic mean" not in rows["dense"], "where nothing is switched off, they say nothing"
    sets = [
        {"set": 0, "test/acc": 0.9, "macs_dynamic": 5},
        {"set": 1, "test/acc": 0.8, "macs_dynamic": 3},
    ]
    write(tmp_path / "switched-seed0", 0.9, 11, macs_dynamic=5, sets=sets)
    _, rows = shown(tmp_path, monkeypatch, capsys)
    for arm, mean, right in (("dense", 7, 95), ("switched", 5, 90), ("switched set 1", 3, 80)):
        assert (float(rows[arm]["macs_dynamic mean"]), float(rows[arm]["test/acc mean"])) == (mean, right)


def test_what_a_recorded_run_lacks_is_a_dash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Summaries of before the count; and no mean over some seeds only."""
    write(tmp_path / "old-seed0", 0.9, 10)
    write(tmp_path / "begun_before-seed0", 0.9, 20, macs_training=None)
    write(tmp_path / "mixed-seed0", 0.9, 30)
    write(tmp_path / "mixed-seed1", 0.9, 30, macs_training=5)
    cells, rows = shown(tmp_path, monkeypatch, capsys)
    assert list(cells) == ["old", "begun_before", "mixed"], "by size"
    assert all(line.count("–") == 1 for line in cells.values())
    assert all(row["macs_training mean"] == row["macs_training sd"] == "" for row in rows.values())
    assert rows["mixed"]["params mean"] == "30"


def test_the_recorded_runs_can_be_compared() -> None:
    recorded = Path(compare.__file__).parent / "*" / "*-seed*"
    arms = compare.by_arm(compare.read(str(recorded)), compare.named(str(recorded)))
    assert "first_runs/gnap" in arms and "controls_cifar10/gnap" in arms
    for arm, summaries in arms.items():
        cells = compare.row(summaries)
        of_runs = () if " level " in arm else ("params_dense", "wall_s")
        assert all(cells[key] is not None for key in ("test/acc", "params", "macs", *of_runs))


def test_no_run_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="name finished runs") as error:
        compare.read(f"{tmp_path}/*")
    assert "\n" not in str(error.value)


def test_the_figure_is_drawn_of_old_and_new_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "new-seed0", 0.9, 10, macs_training=10**12)
    write(tmp_path / "new-seed1", 0.8, 10, macs_training=10**12)
    write(tmp_path / "old-seed0", 0.7, 20)
    for name in ("of_params", "of_macs"):
        monkeypatch.setattr(
            sys, "argv", ["compare", f"runs={tmp_path}/*-seed*", f"figure={tmp_path}/{name}.png"]
        )
        compare.main()
        assert plt.imread(tmp_path / f"{name}.png").std() > 0.05
        write(tmp_path / f"{name}-seed0", 0.7, 20, macs_dynamic=3)
