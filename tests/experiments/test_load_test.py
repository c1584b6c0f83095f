"""Requests over HTTP: the elastic network answers, nothing is lost, numbers are what they are called."""

import csv
from pathlib import Path

import pytest

from elastic.errors import FileError
from elastic.experiments.host import host_network
from elastic.experiments.load_test import HEAD, Reply, score, send_load


def test_the_score_counts_what_is_in_time_and_what_is_lost() -> None:
    replies = [Reply(float(k), accuracy=0.5, level=k % 2) for k in range(1, 100)]
    cells = dict(zip(HEAD[1:], score([*replies, Reply(30_000.0)], deadline=50), strict=True))
    assert cells["in time (%)"] == "50.0" and cells["right in time (%)"] == "25.0"
    assert (cells["p50 (ms)"], cells["p95 (ms)"], cells["p99 (ms)"]) == ("50.0", "95.0", "99.0")
    assert (cells["levels"], cells["requests"], cells["lost"]) == ("0 1", "100", "1")


def test_without_its_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "litserve", None)
    with pytest.raises(FileError, match="litserve is not installed: install the extra `serve`"):
        host_network("digits-gnap-2k")
    with pytest.raises(FileError, match="there is no network none"):
        host_network("none")


@pytest.mark.slow
def test_every_request_is_answered_on_a_loaded_machine(tmp_path: Path) -> None:
    pytest.importorskip("litserve", reason="the extra `serve` is not installed")
    send_load("digits-gnap-2k", deadline=2000, rate=10, seconds=1, images=4, csv=tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["server"] for row in rows] == ["elastic", "level 0"]
    for row in rows:
        assert (row["requests"], row["lost"], row["levels"]) == ("30", "0", "0")
        assert float(row["right in time (%)"]) > 90
