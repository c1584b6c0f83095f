"""Latencies of finished runs: every network that can be chosen gets one, measured and not made up."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic.experiments.compare
from elastic.experiments.tools import timing
from elastic.experiments.tools.timing import make_timed, time_runs
from elastic.experiments.train import train
from tests.fitted import EXACT, command
from tests.runs import configure

pytestmark = pytest.mark.slow
SWITCHED = ("schedule=dynamic", "callbacks.dynamic.gain=[0.1,3.0]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: a network, one with levels, one with two sets of modules."""
    made = tmp_path_factory.mktemp("runs")
    arms = {"plain": (), "joint": ("schedule=joint", "callbacks.joint.fractions=[0.5]"), "switched": SWITCHED}
    for arm, overrides in arms.items():
        train(
            configure(made / f"{arm}-seed0", *EXACT, *overrides),
            made / f"{arm}-seed0",
        )
    return made


def summaries(folder: Path) -> dict[Path, dict[str, Any]]:
    return {run: json.loads((run / "summary.json").read_text()) for run in sorted(folder.iterdir())}


def test_every_network_is_measured_with_what_executes_it(folder: Path) -> None:
    ways = {}
    for run, summary in summaries(folder).items():
        found = list(make_timed(run, summary))
        ways[run.name] = [len(each.executions) for each in found]
        for each in found:
            with torch.inference_mode():
                outputs = [way(each.inputs[0]) for way in each.executions]
            for other in outputs[1:]:
                torch.testing.assert_close(other, outputs[0], atol=1e-4, rtol=1e-4)
    assert ways == {"plain-seed0": [3], "joint-seed0": [3, 3], "switched-seed0": [1, 1]}


def test_the_median_of_the_fastest_way_is_written_down(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th way takes n ms: what is written must be that of the first way of each network."""

    def pretend(ways: list[Any], inputs: list[Any], clock: None) -> list[list[float]]:
        assert len(ways) == len(inputs) and torch.get_num_threads() == 1
        return [[n + 1.0] * 9 + [1000.0] * 3 for n in range(len(ways))]

    monkeypatch.setattr(timing, "measure_times_ms", pretend)
    given = summaries(folder)
    said = time_runs(given)
    joint, plain, switched = given.values()  # in the order of their names
    assert [row["latency_ms"] for row in joint["levels"]] == [1, 4] and joint["latency_ms"] == 4
    assert plain["latency_ms"] == 7
    assert [row["latency_ms"] for row in switched["sets"]] == [10, 11] and switched["latency_ms"] == 10
    assert "5 networks" in said


def test_the_table_and_the_page_have_it_where_it_was_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (f"runs={folder}/*", f"csv={tmp_path}/table.csv", f"html={tmp_path}/page.html")
    code, out, err = command(elastic.experiments.compare.main, monkeypatch, capsys, *asked)
    assert code == 0 and not err and "latency" not in out + (tmp_path / "table.csv").read_text()
    code, out, err = command(elastic.experiments.compare.main, monkeypatch, capsys, *asked, "latency=true")
    assert code == 0 and not err and "latency: one image, one thread, median of 100, 5 networks" in out
    rows = {row["arm"]: row for row in csv.DictReader((tmp_path / "table.csv").read_text().splitlines())}
    assert rows.keys() == {"plain", "joint", "joint level 0", "switched", "switched set 1"}
    assert all(0.01 < float(row["latency_ms mean"]) < 1000 for row in rows.values())
    text = (tmp_path / "page.html").read_text()
    assert "<h3>Accuracy against latency</h3>" in text and "<h3>Levels and sets by latency</h3>" in text
    assert "latency (ms)" in text and text.count("5 networks in turn") == 2


def test_a_run_without_weights_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bare-seed0").mkdir()
    for name in ("summary.json", "config.yaml"):
        (tmp_path / "bare-seed0" / name).write_text((folder / "plain-seed0" / name).read_text())
    code, _, err = command(
        elastic.experiments.compare.main, monkeypatch, capsys, f"runs={tmp_path}/*", "latency=true"
    )
    assert code == 1 and "bare-seed0/model.safetensors is missing" in err and err.count("\n") == 1
