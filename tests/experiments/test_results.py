"""The README's table of results: what is recorded, and nothing else."""

import json
from pathlib import Path

import pytest

import elastic
from elastic.experiments import results

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_table_is_what_its_command_prints() -> None:
    table = results.make_table(results.ROWS)
    assert results.replace_table(README.read_text(), table, results.BEGIN, results.END) == README.read_text()
    assert len(table.splitlines()) == 2 + len(results.ROWS)


def test_a_table_without_its_runs_or_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(elastic.ElasticError, match="has no run gnap-seed"):
        results.make_table(results.ROWS[:1], tmp_path)
    with pytest.raises(elastic.ElasticError, match="no place for the table"):
        results.replace_table("# A README", "", results.BEGIN, results.END)


def test_a_row_has_mean_and_spread_over_its_seeds(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.90, 0.92)):
        run = tmp_path / "experiments" / "question" / f"arm-seed{seed}"
        run.mkdir(parents=True)
        summary = {"test/acc": accuracy, "params": 1_000, "macs": 3_000_000, "macs_dynamic": 1_500_000}
        (run / "summary.json").write_text(json.dumps(summary))
    table = results.make_table([results.Row("dynamic", "question", "arm", "a task")], tmp_path)
    cells = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert cells == [
        *("[dynamic](docs/dynamic.md)", "a task", "91.00 ± 1.41 %", "–", "1,000", "1.5M of 3M"),
        "[2](experiments/question/README.md)",
    ]


def test_of_levels_the_smallest_and_the_largest_are_shown(tmp_path: Path) -> None:
    run = tmp_path / "experiments" / "question" / "arm-seed0"
    run.mkdir(parents=True)
    levels = [{"test/acc": 0.8 + k / 100, "params": 10**k, "macs": 2 * 10 ** (k + 3)} for k in range(1, 4)]
    (run / "summary.json").write_text(json.dumps(levels[-1] | {"levels": levels}))
    table = results.make_table([results.Row("levels", "question", "arm", "a task")], tmp_path)
    assert "| 81.00 to 83.00 % | – | 10 to 1,000 | 20k to 2M |" in table


def test_a_cascade_is_shown_at_its_budget(tmp_path: Path) -> None:
    question = tmp_path / "experiments" / "question"
    run = question / "arm-seed0"
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps({"test/acc": 0.93, "params": 1_000, "macs": 3_000_000}))
    row = results.Row("levels", "question", "arm", "a task", is_cascade=True)
    with pytest.raises(elastic.ElasticError, match=r"cascade.csv has no row .* measure them by"):
        results.make_table([row], tmp_path)
    measured = (
        "question/other,1,0.8,75.0,2,1.00",
        'question/arm,1,0.8,75.0,"1,500,000",92.24',
        "question/arm,1,,,9,9",
    )
    head = 'arm,runs,threshold,by the small level (%),"MACs, mean",test acc (%)'
    (question / "cascade.csv").write_text("\n".join((head, *measured)))
    assert "| 92.24 % | – | 1,000 | 1.5M of 3M |" in results.make_table([row], tmp_path)
