"""Every recorded run measures again, from its files, as it was recorded."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from elastic.experiments.evaluate import evaluate

RECORDED = Path(__file__).parents[2] / "experiments"
FOLDERS = sorted(path.parent for path in RECORDED.glob("*/*-seed*/model.safetensors"))
EXACT = ("params", "params_dense", "macs")
# Sums differ in their last bits from machine to machine, and with them an answer or a kernel that is on.
ACCURACY, MACS_DYNAMIC = 0.001, 5e-3
# Recorded before the means that modules look at were held within four deviations (dynamic_pruning/README.md,
# "A map that is hardly ever on decides alone"): accuracy and MACs of each set since then.
SINCE_BOUNDS = {
    "convnet-linear-seed0": ((0.9944, 1799599), (0.9890, 1329166), (0.9904, 1081666), (0.9675, 875405)),
    "convnet-square-seed0": ((0.9934, 1542953), (0.9919, 1174783), (0.9906, 1030625), (0.9783, 886173)),
}


def mark(folder: Path) -> Any:
    """Digits need no data set."""
    data = json.loads((folder / "summary.json").read_text())["data"]
    marks = [pytest.mark.slow] if data == "digits" else [pytest.mark.slow, pytest.mark.data]
    return pytest.param(folder, id=f"{folder.parent.name}/{folder.name}", marks=marks)


def compare_rows(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in EXACT:
        if key in expected:
            assert actual[key] == expected[key], key
    assert actual["test/acc"] == pytest.approx(expected["test/acc"], abs=ACCURACY)
    if "macs_dynamic" in expected:
        assert actual["macs_dynamic"] == pytest.approx(expected["macs_dynamic"], rel=MACS_DYNAMIC)
    for kind in ("levels", "sets"):
        for row, recorded in zip(actual.get(kind) or (), expected.get(kind) or (), strict=True):
            compare_rows(row, recorded)


def test_there_are_recorded_runs() -> None:
    assert len(FOLDERS) > 90


@pytest.mark.parametrize("folder", [mark(folder) for folder in FOLDERS])
def test_a_recorded_run_measures_as_before(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    if summary["data"] != "digits" and "ELASTIC_DATA" not in os.environ:
        pytest.skip("set ELASTIC_DATA to the folder of the data sets")
    if folder.name in SINCE_BOUNDS:
        sets = [{"test/acc": accuracy, "macs_dynamic": macs} for accuracy, macs in SINCE_BOUNDS[folder.name]]
        summary |= sets[0] | {"sets": sets}
    compare_rows(evaluate(folder), summary)
