"""The table of many runs against numpy."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from elastic.module import TrainingError
from experiments import compare


def write(folder: Path, accuracy: float, params: int) -> None:
    folder.mkdir()
    summary = {"test/acc": accuracy, "params": params, "params_dense": 9, "macs": 7, "wall_s": 1.5}
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
    assert f"{mean:.2f} ± {sd:.2f}" in shown and "50.00 ± 0.00" in shown
    rows = {r["arm"]: r for r in csv.DictReader((tmp_path / "results.csv").read_text().splitlines())}
    assert rows.keys() == {"grown", "dense"} and rows["grown"]["runs"] == "3"
    assert float(rows["grown"]["test/acc sd"]) == pytest.approx(sd, rel=1e-5)


def test_no_run_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="name finished runs") as error:
        compare.read(f"{tmp_path}/*")
    assert "\n" not in str(error.value)
