"""The page: it holds all that it shows, names every arm, and draws only what there is."""

import html
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from elastic.experiments.compare import compare_runs
from elastic.experiments.tools.arms import name_arms, read_arms, read_summaries
from elastic.experiments.tools.charts import (
    Series,
    compute_height,
    find_front,
    plot_against,
    plot_levels,
    plot_over_time,
    space_out,
)
from elastic.experiments.tools.html import list_failures, make_figure

TITLES = ("Accuracy against size", "Accuracy against work", "Levels and sets", "Size over time")


def write(folder: Path, acc: float, params: int, **more: Any) -> None:
    folder.mkdir(parents=True)
    common = {"params_dense": 2 * params, "macs": 10 * params, "macs_dynamic": 9 * params, "wall_s": 1.0}
    (folder / "summary.json").write_text(json.dumps({"test/acc": acc, "params": params, **common, **more}))


def make_page(folder: Path) -> str:
    compare_runs(f"{folder}/*", html=folder / "page.html")
    return (folder / "page.html").read_text()


class Tags(HTMLParser):
    """Checks that tags close in order, and collects attributes and the text of bold cells."""

    VOID = {"meta", "wbr", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.bold: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
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


def test_the_page_holds_all_that_it_shows(folder: Path) -> None:
    text = make_page(folder)
    tags = Tags(text)
    assert text.count("<svg ") >= 5 and "<img" not in text
    assert all(link.startswith("#") for link in tags.links), "of shapes in the same drawing"
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", text)
    assert len(text) < 400_000
    for title in TITLES:
        assert f"<h3>{title}</h3>" in text
    assert "<td>small</td><td>2</td>" in text and "small level 0" in text


def test_what_is_drawn_tells_what_it_is(folder: Path) -> None:
    text = make_page(folder)
    tips = {html.unescape(tip) for tip in re.findall("<title>(.*?)</title>", text)}
    assert "large & wide: 95.00 %, 5,000 parameters that are not zero" in tips
    assert "small: 90.50 ± 0.71 %, 1,000 ± 0 parameters that are not zero" in tips
    assert "small: 100 to 103 parameters that are not zero" in tips
    assert "small, level 1: 60.00 %, 1.1e-05 10⁶ MACs an image, mean" in tips
    legends = re.findall('<ul class="arms">(.*?)</ul>', text)
    assert len(legends) == text.count("<svg ") and all("small</li>" in legend for legend in legends)


def test_levels_without_modules_are_shown_with_their_work(folder: Path) -> None:
    work = make_page(folder).partition("<h3>Accuracy against work</h3>")[2].partition("</figure>")[0]
    assert all(f"small level {k}</li>" in work for k in range(2))


def test_the_page_has_a_title_and_its_table_as_csv(tmp_path: Path) -> None:
    for seed in (0, 1):
        write(tmp_path / f"gnap-seed{seed}", 0.9 + seed / 100, 1000, model="convnet", data="mnist")
    text = make_page(tmp_path)
    assert "<h1>1 arms of convnet on mnist</h1>" in text
    (csv,) = re.findall("<summary>CSV</summary><pre>(.*?)</pre>", text, re.DOTALL)
    head, row = csv.splitlines()
    assert dict(zip(head.split(","), row.split(","), strict=True))["test/acc mean"] == "90.5"


def test_the_best_of_each_column_is_bold_and_what_failed_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = make_page(folder)
    bold = Tags(text).bold
    assert bold[:2] == ["10 ± 0", "10 ± 0"], "params and macs of the smallest level, in the first row"
    assert "95.00" in bold and "90.50 ± 0.71" not in bold and "2,000 ± 0" in bold and "1.000 ± 0.000" in bold
    assert "large &amp; wide" in text and "<b>broken-seed0</b>: lr &lt; 0" in text
    assert "failed: broken-seed0: lr < 0" in capsys.readouterr().out


def test_what_there_is_nothing_of_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "alone-seed0", 0.9, 1000)
    text = make_page(tmp_path)
    assert "<h2>" not in text and "<h3>" not in text and Tags(text).bold[0] == "90.00"
    assert list_failures({}) == ""


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    found = find_front(points)
    for i, (size, right) in enumerate(points):
        beaten = any((s <= size and r >= right) and (s, r) != (size, right) for s, r in points)
        assert ((size, right) in [points[k] for k in found]) == (not beaten), i
    sizes = [points[k][0] for k in found]
    assert sizes == sorted(sizes)


@given(st.lists(st.floats(-0.5, 1.5, allow_nan=False), min_size=1, max_size=30), st.floats(0.001, 1 / 30))
def test_names_keep_their_order_and_lie_space_out(wanted: list[float], gap: float) -> None:
    places = space_out(wanted, gap)
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    found = [places[i] for i in order]
    assert all(after - before >= gap - 1e-9 for before, after in pairwise(found))
    assert found[0] >= -1e-9 and found[-1] <= 1 + 1e-9


def test_names_that_have_room_are_where_they_are_wanted() -> None:
    assert space_out([0.9, 0.1, 0.5], 0.1) == pytest.approx([0.9, 0.1, 0.5])
    assert space_out([0.5, 0.5, 2.0], 0.1) == pytest.approx([0.5, 0.6, 1.0])


def test_numbers_of_a_drawn_figure_do_not_overlap() -> None:
    """As they are drawn: twelve arms at nearly the same point, and one far away."""
    arms = [Series(i, "one", "C0", [{"test/acc": 0.9 + i / 1e4, "params": 100}]) for i in range(12)]
    arms.append(Series(12, "far", "C1", [{"test/acc": 0.1, "params": 1000}]))
    figure, panel = plt.subplots(figsize=(7, compute_height(len(arms))), layout="constrained")
    assert plot_against(arms, "params", "x")(panel)
    figure.canvas.draw()
    boxes = sorted((Text.get_window_extent(text) for text in panel.texts), key=lambda box: box.y0)
    shown = figure.get_window_extent()
    assert len(boxes) == len(arms)
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
    assert all(shown.x0 <= box.x0 and box.x1 <= shown.x1 for box in boxes)
    plt.close(figure)


@pytest.mark.parametrize("values", [(1, 10**6), (6.2e12, 16.7e12), (5, 5), (0.2, 0.9)])
def test_ticks_of_a_logarithmic_axis_have_labels(values: tuple[float, float]) -> None:
    arms = [
        Series(i, str(i), "C0", [{"test/acc": 0.5 + i / 10, "params": value}])
        for i, value in enumerate(values)
    ]
    figure, panel = plt.subplots(layout="constrained")
    assert plot_against(arms, "params", "x")(panel)
    figure.canvas.draw()
    low, high = panel.get_xlim()
    inside = [label.get_text() for label in panel.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert 2 <= len(inside) <= 20 and all(inside)
    assert all(label[-1] in "kMT" for label in inside if max(values) > 10**7)
    assert not any("m" in label for label in inside)
    plt.close(figure)


def test_arms_of_the_same_name_in_different_folders_are_different(tmp_path: Path) -> None:
    write(tmp_path / "digits" / "gnap-seed0", 0.9, 1000)
    write(tmp_path / "cifar" / "gnap-seed0", 0.8, 2000)
    arms = read_arms(f"{tmp_path}/*/*", read_summaries(f"{tmp_path}/*/*"))
    assert [arm.name for arm in arms] == ["digits/gnap", "cifar/gnap"]
    assert set(name_arms(f"{tmp_path}/digits/*").values()) == {"gnap"}


def test_seeds_of_different_levels_are_not_drawn_as_one_line() -> None:
    levels = [{"macs": k, "test/acc": 0.5} for k in range(3)]
    runs = [{"test/acc": 0.5, "levels": levels[:count]} for count in (2, 3)]
    draw = plot_levels([Series(1, "a", "C0", runs)], ["macs"], "MACs")
    assert draw(plt.figure().gca()) == []
    plt.close("all")


def test_figures_of_nothing_are_nothing() -> None:
    def series(run: dict[str, Any]) -> list[Series]:
        return [Series(1, "one", "C0", [run], [[]])]

    assert make_figure("a", "b", plot_against(series({"test/acc": 0.5, "params": 3}), "params", "x")) == ""
    assert make_figure("a", "b", plot_over_time(series({}), "params", "x")) == ""
    assert make_figure("a", "b", plot_levels(series({"test/acc": 0.5, "levels": []}), ["macs"], "x")) == ""
    sets = series(
        {
            "test/acc": 0.2,
            "sets": [{"macs_dynamic": 1, "test/acc": 0.1}, {"macs_dynamic": 2, "test/acc": 0.2}],
        }
    )
    assert make_figure("a", "b", plot_levels(sets, ["latency_ms"], "x")) == ""
    figure = make_figure("<a>", "b & c", plot_levels(sets, ["macs_dynamic", "macs"], "x"))
    assert html.escape("<a>") in figure and "b &amp; c" in figure


def test_each_data_set_has_a_section_with_its_own_front(tmp_path: Path) -> None:
    for data in ("mnist", "cifar10"):
        for arm, params in (("dense", 1000), ("gates", 10)):
            write(tmp_path / f"{data}-{arm}-seed0", 0.9, params, data=data, git="abc1234", seed=0)
    text = make_page(tmp_path)
    Tags(text)
    parts = re.split("<h2>", text)
    assert [part.partition("</h2>")[0] for part in parts[1:]] == ["cifar10", "mnist"]
    for part in parts[1:]:
        assert part.count("<h3>Accuracy against size</h3>") == 1 and part.count("<table>") == 1
        assert part.count(r"\begin{tabular}") == 1 and "<td>dense</td>" in part and "<td>gates</td>" in part


def test_the_page_says_what_was_run(tmp_path: Path) -> None:
    about = {"git": "abc1234", "device": "a machine <1>", "torch": "2.13", "budget/target": 2000}
    for seed in (0, 1):
        write(tmp_path / f"gnap-seed{seed}", 0.9, 1000, seed=seed, **about)
    text = make_page(tmp_path)
    hardware = "Hardware: a machine &lt;1&gt;"
    for fact in ("Commit: abc1234", hardware, "Seeds: 0, 1", "Budget: 2,000", "torch: 2.13"):
        assert fact in text
    assert re.search(r"Made: \d{4}-\d\d-\d\d<br>", text)
