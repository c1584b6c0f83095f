"""The table of cascades: its ends are the levels themselves, as the summary has them."""

import csv
from pathlib import Path

import pytest
import torch

from elastic.errors import FileError, OptionError
from elastic.experiments.cascade import compute_outputs, measure_cascade, show_cascade
from elastic.experiments.tools.per_image import read_test_batches
from elastic.experiments.tools.restore import restore
from elastic.experiments.train import train
from elastic.levels import run_cascade
from tests.runs import TINY, configure

LEVELS = (
    "schedule=joint",
    "callbacks.joint.fractions=[0.4,0.7]",
    "experiment=smoke",
    "trainer.max_epochs=3",
    "lr_scheduler=constant",
    "optimizer.lr=1e-2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "joint-seed0"
    train(configure(folder, *TINY, *LEVELS), folder)
    return folder


def test_never_and_always_sure_are_the_levels_of_the_summary(folder: Path) -> None:
    levels = restore(folder).summary["levels"]
    outputs = compute_outputs(folder)
    assert list(outputs.macs) == [levels[0]["macs"], levels[-1]["macs"]]
    first, last = measure_cascade(outputs, 0.0), measure_cascade(outputs, 1.0)
    assert first.accuracy == pytest.approx(levels[0]["test/acc"], abs=1e-3)
    assert (first.macs, first.small) == (levels[0]["macs"], 1.0)
    assert last.accuracy == pytest.approx(levels[-1]["test/acc"], abs=1e-3)
    assert (last.macs, last.small) == (levels[0]["macs"] + levels[-1]["macs"], 0.0)


def test_the_table_is_what_the_levels_themselves_do(folder: Path, tmp_path: Path) -> None:
    show_cascade(str(folder), small=1, csv=tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    (row,) = (row for row in rows if row["threshold"] == "0.600")
    finished = restore(folder)
    nets = [finished.network.plain(k) for k in (1, 2)]
    right = first = images = 0
    with torch.inference_mode():
        for x_BCHW, y_B in read_test_batches(finished.data):
            logits_BK, index_B = run_cascade(nets, x_BCHW, 0.6)
            right += int((logits_BK.argmax(1) == y_B).sum())
            first += int((index_B == 0).sum())
            images += len(y_B)
    assert float(row["test acc (%)"]) == pytest.approx(100 * right / images, abs=0.5)
    assert float(row["by the small level (%)"]) == pytest.approx(100 * first / images, abs=0.5)


@pytest.mark.slow
def test_a_budget_adds_a_row_of_as_many_macs_for_the_mean_of_all_seeds(folder: Path, tmp_path: Path) -> None:
    second = folder.with_name("joint-seed1")
    if not second.exists():
        train(configure(second, *TINY, *LEVELS, "seed=1"), second)
    levels = restore(folder).summary["levels"]
    budget = levels[0]["macs"] + 0.5 * levels[-1]["macs"]
    text = tmp_path / "text.md"
    text.write_text("<!-- begin of `elastic cascade` -->\n<!-- end of `elastic cascade` -->\n")
    table = tmp_path / "table.csv"
    show_cascade(f"{folder.parent}/joint-seed*", budget=budget, csv=table, markdown=text)
    row, *_ = csv.DictReader(table.read_text().splitlines())
    assert row["runs"] == "2" and row["arm"] == "joint"
    macs = float(row["MACs, mean"].split(" ±")[0].replace(",", ""))
    assert 0.9 * budget < macs <= budget
    assert row["test acc (%)"] in text.read_text()


def test_a_run_without_levels_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    train(configure(plain, *TINY, "experiment=smoke", "schedule=static"), plain)
    with pytest.raises(OptionError, match="0 levels below the network"):
        show_cascade(str(tmp_path / "plain"))
    with pytest.raises(OptionError, match="no finished run among"):
        show_cascade(str(tmp_path / "nothing"))


def test_a_level_that_is_not_below_the_network_is_named(folder: Path) -> None:
    with pytest.raises(
        OptionError, match="2 levels below the network, and no level 2: set small to one of 0 … 1"
    ):
        show_cascade(str(folder), small=2)


def test_a_text_without_marks_is_refused_before_any_run_is_read(tmp_path: Path) -> None:
    text = tmp_path / "text.md"
    text.write_text("# A text")
    with pytest.raises(FileError, match="no place for the table: put '<!-- begin of `elastic cascade` -->'"):
        show_cascade(str(tmp_path / "none"), markdown=text)
