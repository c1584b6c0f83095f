"""The table of many runs against numpy."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.stats import ttest_rel

from elastic.errors import FileError, OptionError
from elastic.experiments.compare import compare_runs
from elastic.experiments.tools.arms import read_arms, read_failures, read_summaries, shorten_names
from elastic.experiments.tools.differences import compute_difference
from elastic.experiments.tools.figure import draw_arms, save_figure
from elastic.experiments.tools.results import list_facts, make_tables, write_latex
from elastic.experiments.tools.tables import format_markdown


def write(folder: Path, accuracy: float, params: int, **more: Any) -> None:
    folder.mkdir(parents=True)
    summary = {"test/acc": accuracy, "params": params, "params_dense": 9, "macs": 7, "wall_s": 1.5, **more}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_mean_and_sd_by_arm(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    accuracies = [0.91, 0.95, 0.93]
    for seed, accuracy in enumerate(accuracies):
        write(tmp_path / f"grown-seed{seed}", accuracy, 100 + seed)
    write(tmp_path / "dense-seed0", 0.5, 1000)
    (tmp_path / "grown-seed9").mkdir()  # unfinished
    compare_runs(f"{tmp_path}/*", csv=tmp_path / "results.csv")
    shown = capsys.readouterr().out
    mean, sd = 100 * np.mean(accuracies), 100 * np.std(accuracies, ddof=1)
    assert f"{mean:.2f} ± {sd:.2f}" in shown and "50.00 ± " not in shown, "of one run there is no sd"
    rows = {r["arm"]: r for r in csv.DictReader((tmp_path / "results.csv").read_text().splitlines())}
    assert rows.keys() == {"grown", "dense"} and rows["grown"]["runs"] == "3"
    assert float(rows["grown"]["test/acc sd"]) == pytest.approx(sd, rel=1e-5)


def test_the_table_is_put_between_its_marks(tmp_path: Path) -> None:
    """What stands around it stays, and what an earlier call has put there goes."""
    write(tmp_path / "grown-seed0", 0.91, 1100)
    write(tmp_path / "dense-seed0", 0.5, 100)
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin of `elastic compare` -->\nold\n<!-- end of `elastic compare` -->\nz\n")
    for _ in range(2):
        compare_runs(f"{tmp_path}/*-seed0", markdown=page)
    before, table, after = page.read_text().split("`elastic compare` -->")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[1:-1]]
    assert [row[:4] for row in rows[2:]] == [["dense", "1", "50.00", "100"], ["grown", "1", "91.00", "1,100"]]
    assert len({len(row) for row in rows}) == 1 and set(rows[1]) == {"---"}
    assert before.startswith("a\n") and after == "\nz\n"
    page.write_text("none")
    with pytest.raises(FileError, match=r"no place for the table: put '<!-- begin of `elastic compare` -->'"):
        compare_runs(f"{tmp_path}/*-seed0", markdown=page)
    with pytest.raises(FileError, match=r"page\.md is missing"):
        compare_runs(f"{tmp_path}/*-seed0", markdown=tmp_path / "no" / "page.md")


def test_of_several_tables_in_a_text_each_stands_between_marks_that_name_its_runs(tmp_path: Path) -> None:
    write(tmp_path / "grown-seed0", 0.91, 1100)
    write(tmp_path / "dense-seed0", 0.5, 100)
    page, globs = tmp_path / "page.md", [f"{tmp_path}/{arm}-seed*" for arm in ("grown", "dense")]
    marks = [f"<!-- {{}} of `elastic compare{name}` -->" for name in ("", *(f" runs={g}" for g in globs))]
    page.write_text("\n".join(mark.format(part) for mark in marks for part in ("begin", "end")))
    for glob in (*globs, f"{tmp_path}/*-seed0"):
        compare_runs(glob, markdown=page)
    both, *tables = (part.split("<!-- end")[0] for part in page.read_text().split("<!-- begin")[1:])
    assert [("| grown |" in table, "| dense |" in table) for table in (both, *tables)] == [
        (True, True),
        (True, False),
        (False, True),
    ]


def shown(
    folder: Path, capsys: pytest.CaptureFixture
) -> tuple[dict[str, list[str]], dict[str, dict[str, str]]]:
    """The table's cells and the file's, by arm."""
    compare_runs(f"{folder}/*", csv=folder / "results.csv")
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines()]
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines if line}
    rows = csv.DictReader((folder / "results.csv").read_text().splitlines())
    return cells, {row["arm"]: row for row in rows}


def test_training_macs_are_shown_in_units_of_1e12(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed, macs in enumerate((1_500_000_000_000, 2_500_000_000_000)):
        write(tmp_path / f"new-seed{seed}", 0.9, 10, macs_training=macs)
    cells, rows = shown(tmp_path, capsys)
    assert "2.000 ± 0.707" in cells["new"]
    assert float(rows["new"]["macs_training mean"]) == 2
    assert float(rows["new"]["macs_training sd"]) == pytest.approx(0.5**0.5, rel=1e-5)


def test_sets_of_modules_are_arms_and_have_mean_macs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "dense-seed0", 0.95, 10, macs_dynamic=7)
    _, rows = shown(tmp_path, capsys)
    assert "macs_dynamic mean" not in rows["dense"], "where nothing is switched off, they say nothing"
    sets = [
        {"set": 0, "test/acc": 0.9, "macs_dynamic": 5},
        {"set": 1, "test/acc": 0.8, "macs_dynamic": 3},
    ]
    write(tmp_path / "switched-seed0", 0.9, 11, macs_dynamic=5, sets=sets)
    _, rows = shown(tmp_path, capsys)
    for arm, mean, right in (("dense", 7, 95), ("switched", 5, 90), ("switched set 1", 3, 80)):
        assert (float(rows[arm]["macs_dynamic mean"]), float(rows[arm]["test/acc mean"])) == (mean, right)


def test_what_a_recorded_run_lacks_is_a_dash(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Summaries of before the count; and no mean over some seeds only."""
    write(tmp_path / "old-seed0", 0.9, 10)
    write(tmp_path / "begun_before-seed0", 0.9, 20, macs_training=None)
    write(tmp_path / "mixed-seed0", 0.9, 30)
    write(tmp_path / "mixed-seed1", 0.9, 30, macs_training=5)
    cells, rows = shown(tmp_path, capsys)
    assert list(cells) == ["old", "begun_before", "mixed"], "by size"
    assert all(line.count("–") == 1 for line in cells.values())
    assert all(row["macs_training mean"] == row["macs_training sd"] == "" for row in rows.values())
    assert rows["mixed"]["params mean"] == "30"


def test_the_recorded_runs_can_be_compared() -> None:
    recorded = str(Path(__file__).parents[2] / "experiments" / "*" / "*-seed*")
    arms = {arm.name: arm for arm in read_arms(recorded, read_summaries(recorded))}
    assert "first_runs/gnap" in arms and "controls_cifar10/gnap" in arms
    for name, arm in arms.items():
        of_runs = () if " level " in name else ("params_dense", "wall_s")
        assert all(arm.list_values(key) for key in ("test/acc", "params", "macs", *of_runs))
    tables = {table.data: table for table in make_tables(list(arms.values()))}
    assert tables.keys() == {"cifar10", "cifar10_mnist", "digits", "mnist"}
    assert sum(len(table.rows) for table in tables.values()) == len(arms)


@pytest.mark.parametrize(
    "summary", ["{", "[1]", "3", "{}", '{"test/acc": null}', '{"test/acc": 1, "macs": "x"}']
)
def test_a_damaged_summary_is_named(tmp_path: Path, summary: str) -> None:
    (tmp_path / "run-seed0").mkdir()
    (tmp_path / "run-seed0" / "summary.json").write_text(summary)
    with pytest.raises(FileError, match=r"run-seed0/summary\.json is damaged"):
        read_summaries(f"{tmp_path}/*")


def test_no_run_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="name finished runs") as error:
        read_summaries(f"{tmp_path}/*")
    assert "\n" not in str(error.value)


def test_the_figure_is_drawn_of_old_and_new_runs(tmp_path: Path) -> None:
    write(tmp_path / "new-seed0", 0.9, 10, macs_training=10**12)
    write(tmp_path / "new-seed1", 0.8, 10, macs_training=10**12)
    write(tmp_path / "old-seed0", 0.7, 20)
    for name in ("of_params", "of_macs"):
        compare_runs(f"{tmp_path}/*-seed*", figure=tmp_path / f"{name}.png")
        assert plt.imread(tmp_path / f"{name}.png").std() > 0.05
        write(tmp_path / f"{name}-seed0", 0.7, 20, macs_dynamic=3, data="other")


# --- several data sets, names, units ------------------------------------------------------------------------


def test_each_data_set_has_a_table_with_a_best_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path / "mnist-dense-seed0", 0.99, 10, data="mnist")
    write(tmp_path / "mnist-gates-seed0", 0.98, 5, data="mnist")
    write(tmp_path / "cifar10-dense-seed0", 0.90, 100, data="cifar10")
    write(tmp_path / "cifar10-gates-seed0", 0.91, 50, data="cifar10")
    pattern = f"{tmp_path}/*"
    cifar10, mnist = make_tables(read_arms(pattern, read_summaries(pattern)))
    assert (cifar10.data, mnist.data) == ("cifar10", "mnist")
    assert [row[0] for row in cifar10.rows] == [row[0] for row in mnist.rows] == ["gates", "dense"]
    assert {(0, 2), (0, 3)} <= cifar10.best and {(1, 2), (0, 3)} <= mnist.best
    _, rows = shown(tmp_path, capsys)
    assert rows.keys() == {f"{data}-{arm}" for data in ("mnist", "cifar10") for arm in ("dense", "gates")}
    compare_runs(pattern)
    out = capsys.readouterr().out
    assert out.index("cifar10") < out.index("91.00") < out.index("mnist") < out.index("98.00")


def test_arms_of_one_name_are_as_many_as_questions_data_sets_and_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """However deep the folder lies that tells them apart."""
    write(tmp_path / "a" / "runs" / "fixed-seed0", 0.5, 10)
    write(tmp_path / "b" / "runs" / "fixed-seed0", 0.9, 10)
    (tmp_path / "b" / "runs" / "lost-seed0").mkdir()
    (tmp_path / "b" / "runs" / "lost-seed0" / "failed.json").write_text('{"error": "why"}')
    pattern = f"{tmp_path}/*/runs/*"
    arms = read_arms(pattern, read_summaries(pattern))
    assert {arm.name: arm.list_values("test/acc") for arm in arms} == {
        "a/runs/fixed": [0.5],
        "b/runs/fixed": [0.9],
    }
    assert read_failures(pattern) == {"b/runs/lost-seed0": "why"}
    for seed, data in enumerate(("mnist", "digits")):
        write(tmp_path / "c" / f"fixed-seed{seed}", 0.5, 10, data=data)
        (tmp_path / "c" / f"fixed-seed{seed}" / "history.jsonl").write_text(
            f'{{"epoch": {seed}, "params": 1, "params_dense": 1}}'
        )
    (tmp_path / "c" / "fixed-seed2").mkdir()
    (tmp_path / "c" / "fixed-seed2" / "summary.json").write_text(
        json.dumps({"data": "digits", "test/iou": 0.3, "params": 10})
    )
    tables = make_tables(read_arms(f"{tmp_path}/c/*", read_summaries(f"{tmp_path}/c/*")))
    assert [table.title for table in tables] == ["digits, test accuracy", "digits, test iou", "mnist"]
    histories = [[row["epoch"] for rows in table.arms[0].histories for row in rows] for table in tables]
    assert histories == [[1], [], [0]]


def test_runs_are_found_under_home_and_by_names_with_signs_of_a_glob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a[1]", 0.5, 10)
    (tmp_path / "a file").touch()
    assert [*read_summaries("~/*")] == [*read_summaries("~/a[1]")] == [tmp_path / "a[1]"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a-x-1", "a-y-1"], ["x", "y"]),
        (["mnist-growth+gates-budget=2000", "mnist-growth+gates-budget=500"], ["budget=2000", "budget=500"]),
        (["a-x", "a"], ["a-x", "a"]),  # nothing were left of the second
        (["x-y", "y-x"], ["x-y", "y-x"]),
        (["one/gnap", "one/dense"], ["gnap", "dense"]),
        (["one/gnap", "two/gnap"], ["one/", "two/"]),
        (["one/a-gnap", "two/b-gnap"], ["one/a", "two/b"]),
        (["alone-1"], ["alone-1"]),
        (["gnap", "dense"], ["gnap", "dense"]),
    ],
)
def test_names_are_what_varies(names: list[str], short: list[str]) -> None:
    assert list(shorten_names(names).values()) == short


def test_levels_and_sets_keep_their_numbers_behind_short_names(tmp_path: Path) -> None:
    levels = [{"level": k, "params": 5 + k, "macs": 4, "test/acc": 0.5} for k in range(2)]
    for arm in ("joint", "reconstruct"):
        write(tmp_path / f"mnist-{arm}-seed0", 0.9, 6, data="mnist", levels=levels)
    arms = read_arms(f"{tmp_path}/*", read_summaries(f"{tmp_path}/*"))
    assert {arm.label for arm in arms} == {"joint", "joint level 0", "reconstruct", "reconstruct level 0"}


@pytest.mark.parametrize(
    ("macs", "head", "texts"),
    [
        ([430_000_000, 2_000_000_000], "training GMACs", ["0.430", "2.000"]),
        ([6_200_000_000_000, 16_700_000_000_000], "training TMACs", ["6.200", "16.700"]),
        ([400_000, 2_000_000_000_000], "training MMACs", ["0.400", "2,000,000.000"]),
        ([12, 13], "training MACs", ["12.000", "13.000"]),
    ],
)
def test_a_column_has_one_unit_and_digits_for_its_smallest(
    tmp_path: Path, macs: list[int], head: str, texts: list[str]
) -> None:
    for i, value in enumerate(macs):
        write(tmp_path / f"arm{i}-seed0", 0.9, 10 + i, macs_training=value)
    (table,) = make_tables(read_arms(f"{tmp_path}/*", read_summaries(f"{tmp_path}/*")))
    column = list(table.head).index(head)
    assert [row[column] for row in table.rows] == texts


def test_arms_are_compared_seed_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Against scipy's own paired test; seeds that one of the two lacks do not count."""
    ours, theirs = [0.93, 0.916, 0.94, 0.92], [0.92, 0.91, 0.925, 0.915]
    for seed, (accuracy, other) in enumerate(zip(ours, theirs, strict=True)):
        write(tmp_path / f"looking-seed{seed}", accuracy, 2, seed=seed)
        write(tmp_path / f"blind-seed{seed}", other, 1, seed=seed)
    write(tmp_path / "blind-seed9", 0.1, 1, seed=9)
    write(tmp_path / "one-seed2", 0.5, 3, seed=2)
    write(tmp_path / "none-seed7", 0.5, 4, seed=7)
    compare_runs(f"{tmp_path}/*", csv=tmp_path / "results.csv", baseline="blind")
    head, *rows = csv.reader((tmp_path / "results.csv").read_text().splitlines())
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    test = ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    columns = [f"− blind {part}" for part in ("pairs", "mean", "95 %", "p")]
    found = [float(cells["looking"][column]) for column in columns]
    assert found == pytest.approx([4, 50 * (low + high), 50 * (high - low), test.pvalue], rel=0.01)
    assert [cells["one"][column] for column in columns] == ["1", "-42.5", "", ""]
    assert not any(cells[arm][columns[0]] for arm in ("none", "blind"))
    shown = capsys.readouterr().out
    assert f"+{50 * (low + high):.2f} ± {50 * (high - low):.2f}" in shown and "-42.50 " in shown
    with pytest.raises(
        OptionError, match="there is no arm fixed to compare with: name one of blind, looking"
    ):
        compare_runs(f"{tmp_path}/*", baseline="fixed")


@pytest.mark.parametrize(("ours", "p"), [((0.5, 0.25), 1.0), ((0.75, 0.5), 0.0)])
def test_differences_that_do_not_vary_need_no_test(tmp_path: Path, ours: Sequence[float], p: float) -> None:
    for seed, accuracy in enumerate(ours):
        write(tmp_path / f"a-seed{seed}", accuracy, 2, seed=seed)
        write(tmp_path / f"b-seed{seed}", (0.5, 0.25)[seed], 1, seed=seed)
    arms = {arm.name: arm for arm in read_arms(f"{tmp_path}/*", read_summaries(f"{tmp_path}/*"))}
    found = compute_difference(arms["a"], arms["b"])
    assert found is not None and (found.margin, found.p) == (0, p)


def test_a_level_is_compared_with_the_same_seed_of_a_network(tmp_path: Path) -> None:
    for seed in range(2):
        levels = [{"level": i, "test/acc": 0.8 + 0.1 * i + 0.01 * seed, "params": 1 + i} for i in range(2)]
        write(tmp_path / f"joint-seed{seed}", 0.9 + 0.01 * seed, 2, seed=seed, levels=levels)
        write(tmp_path / f"alone-seed{seed}", 0.82 + 0.02 * seed, 1, seed=seed)
    (table,) = make_tables(read_arms(f"{tmp_path}/*", read_summaries(f"{tmp_path}/*")), baseline="alone")
    assert {row[0]: row[-2].split()[0] for row in table.rows if row[-2] != "–"} == {
        "joint level 0": "-2.50",
        "joint": "+7.50",
    }


def test_a_metric_that_is_no_number_is_shown_as_such_and_best_of_nothing(tmp_path: Path) -> None:
    """As the score of a class that the test split lacks."""
    for seed, ours, theirs in ((0, 0.9, math.nan), (1, 0.8, 0.7)):
        write(tmp_path / f"ours-seed{seed}", ours, 100, seed=seed)
        write(tmp_path / f"theirs-seed{seed}", theirs, 100, seed=seed)
    compare_runs(f"{tmp_path}/*", baseline="ours", html=tmp_path / "page.html", figure=tmp_path / "f.png")
    runs = f"{tmp_path}/*-seed*"
    (table,) = make_tables(read_arms(runs, read_summaries(runs)), "ours")
    rows = {row[0]: row for row in table.rows}
    assert rows["ours"][2] == "85.00 ± 7.07" and rows["theirs"][2] == "nan ± nan"
    assert rows["theirs"][-2:] == ["+nan ± nan", "nan"]
    assert {i for i, j in table.best if j == 2} == {list(rows).index("ours")}


def test_a_run_that_is_not_finished_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its arm's mean is of fewer seeds than one might think."""
    write(tmp_path / "arm-seed0", 0.9, 100)
    for name in ("arm-seed1", "failed-seed0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "failed-seed0" / "failed.json").write_text('{"error": "why"}')
    compare_runs(f"{tmp_path}/*")
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "failed: failed-seed0: why",
        "not finished: arm-seed1",
    ]


def test_latex_can_be_typeset(tmp_path: Path) -> None:
    write(tmp_path / "a_b-seed0", 0.9, 1000)
    write(tmp_path / "a_b-seed1", 0.8, 1000)
    write(tmp_path / "c%d-seed0", 0.7, 2000, macs_training=10)
    (table,) = make_tables(read_arms(f"{tmp_path}/*", read_summaries(f"{tmp_path}/*")))
    lines = write_latex(table).splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrrrr}" and lines[-1] == r"\end{tabular}"
    assert lines[4].startswith(r"a\_b & 2 & \textbf{85.00 $\pm$ 7.07} & \textbf{1,000 $\pm$ 0} & ")
    assert lines[5].startswith(r"c\%d & 1 & 70.00 & 2,000 & ")
    assert lines[4].split(" & ")[6] == "--" and all(line.count(" & ") == 7 for line in lines[4:6])
    write(tmp_path / "e$f{g}~^\\<|\n-seed0", 0.6, 3000)
    (table,) = make_tables(read_arms(f"{tmp_path}/*", read_summaries(f"{tmp_path}/*")))
    name = r"e\$f\{g\}\textasciitilde{}\textasciicircum{}\textbackslash{}\textless{}\textbar{}  & 1 & "
    assert write_latex(table).splitlines()[6].startswith(name)
    assert format_markdown(table.head, table.rows).splitlines()[4].startswith(r"| e$f{g}~^\&lt;\|  | 1 | ")
    draw_arms([table.arms], "params", tmp_path / "arms.png")


def test_each_metric_on_the_same_data_has_a_table(tmp_path: Path) -> None:
    write(tmp_path / "a-seed0", 0.9, 10, data="shapes")
    write(tmp_path / "b-seed0", float("nan"), 10, data="shapes")
    text = json.dumps({"data": "shapes", "test/r2": 12.5, "params": 5})
    (tmp_path / "c-seed0").mkdir()
    (tmp_path / "c-seed0/summary.json").write_text(text)
    tables = make_tables(read_arms(f"{tmp_path}/*", read_summaries(f"{tmp_path}/*")))
    assert [table.title for table in tables] == ["shapes, test accuracy", "shapes, test r2"]
    assert [len(table.rows) for table in tables] == [2, 1] and (0, 2) in tables[0].best


def test_what_is_damaged_beside_a_summary_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a-seed0", 0.9, 10, levels=None, seed=0)
    write(tmp_path / "b-seed0", 0.9, 10, seed="one", **{"budget/target": [1, 2]})
    (tmp_path / "c-seed0").mkdir()
    (tmp_path / "c-seed0/failed.json").write_text("{")
    pattern = f"{tmp_path}/*"
    assert read_failures(pattern) == {"c-seed0": "failed.json is damaged"}
    assert list_facts(read_arms(pattern, read_summaries(pattern)))["Seeds"] == "0, one"
    for text in ('{"epoch": 1, "par', '{"epoch": 1}'):
        (tmp_path / "a-seed0/history.jsonl").write_text(text)
        with pytest.raises(FileError, match=r"history.jsonl is damaged"):
            read_arms(pattern, read_summaries(pattern))
    (tmp_path / "a-seed0/history.jsonl").unlink()
    write(tmp_path / "d-seed0", 0.9, 10, levels=[{"level": 0}])
    with pytest.raises(FileError, match=r"summary.json is damaged"):
        read_summaries(pattern)


def test_a_picture_of_no_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"x\.nonsense cannot be a picture: end its name in one of .*png"):
        save_figure(plt.figure(), tmp_path / "x.nonsense")
    assert not list(tmp_path.iterdir())
