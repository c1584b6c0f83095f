"""The page: it holds all that it shows, names every arm, and draws only what there is."""

import html
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import compare
from experiments.page import against, by_level, failures, front, over_time, picture

TITLES = ("Accuracy against size", "Accuracy against work", "Levels and sets", "Size over time")


def write(folder: Path, acc: float, params: int, **more: Any) -> None:
    folder.mkdir(parents=True)
    common = {"params_dense": 2 * params, "macs": 10 * params, "macs_dynamic": 9 * params, "wall_s": 1.0}
    (folder / "summary.json").write_text(json.dumps({"test/acc": acc, "params": params, **common, **more}))


def made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["compare", f"runs={folder}/*", f"html={folder}/page.html"])
    compare.main()
    return (folder / "page.html").read_text()


class Tags(HTMLParser):
    """Checks that tags close in order, and collects attributes and the text of bold cells."""

    VOID = {"meta", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.bold: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "b":
            self.bold.append(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    levels = [{"level": k, "params": 10, "macs": 10 + k, "test/acc": 0.5 + k / 10} for k in range(3)]
    for seed in (0, 1):
        write(tmp_path / f"small-seed{seed}", 0.9 + seed / 100, 1000, levels=levels, macs_training=10**12)
    write(tmp_path / "large & wide-seed0", 0.95, 5000, macs_training=2 * 10**12)
    (tmp_path / "broken-seed0").mkdir()
    (tmp_path / "broken-seed0" / "failed.json").write_text('{"error": "lr < 0"}')
    history = [{"epoch": e, "params": 100 + e, "params_dense": 200 + e} for e in range(4)]
    (tmp_path / "small-seed0" / "history.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in history)
    )
    return tmp_path


def test_the_page_holds_all_that_it_shows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = made(folder, monkeypatch)
    tags = Tags(text)
    assert all(link.startswith("data:image/png;base64,") for link in tags.links) and len(tags.links) >= 5
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)
    assert len(text) < 2_000_000
    for title in TITLES:
        assert f"<h2>{title}</h2>" in text
    assert "<td>small</td><td>2</td>" in text and "small level 0" in text


def test_the_most_accurate_arm_is_bold_and_what_failed_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = made(folder, monkeypatch)
    assert Tags(text).bold[:2] == ["large & wide", "1"]
    assert "large &amp; wide" in text and "<b>broken-seed0</b>: lr &lt; 0" in text
    assert "failed: broken-seed0: lr < 0" in capsys.readouterr().out


def test_what_there_is_nothing_of_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "alone-seed0", 0.9, 1000)
    text = made(tmp_path, monkeypatch)
    assert "<h2>" not in text and Tags(text).bold[0] == "alone"
    assert failures({}) == ""


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    found = front(points)
    for i, (size, right) in enumerate(points):
        beaten = any((s <= size and r >= right) and (s, r) != (size, right) for s, r in points)
        assert ((size, right) in [points[k] for k in found]) == (not beaten), i
    sizes = [points[k][0] for k in found]
    assert sizes == sorted(sizes)


def test_figures_of_nothing_are_nothing() -> None:
    assert picture("a", "b", against({"one": [{"test/acc": 0.5, "params": 3}]}, "params", "x")) == ""
    assert picture("a", "b", over_time({"one": [[]]}, "params", "x")) == ""
    assert picture("a", "b", by_level({"one": [{"test/acc": 0.5, "levels": []}]})) == ""
    drawn = picture("<a>", "b & c", by_level({"x": [{"sets": [{"macs_dynamic": 1, "test/acc": 0.1}] * 2}]}))
    assert html.escape("<a>") in drawn and "b &amp; c" in drawn
