"""What the progress bar says beside Lightning's own figures."""

from pathlib import Path
from typing import Any

import pytest

from elastic.measure import counts
from tests.fitted import EXACT, Spy, fit, prepare

BAR = "callbacks.progress={_target_: elastic.callbacks.ElasticProgress}"


def shown(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The bar's figures at the end of every epoch."""
    rows: list[dict[str, Any]] = []

    def look(trainer: Any, module: Any) -> None:
        rows.append(trainer.progress_bar_callback.get_metrics(trainer, module))
        rows[-1]["counted"] = f"{counts.count_params(module.net):,}/{counts.count_params_dense(module.net):,}"

    fit(folder, *EXACT, BAR, *options, after=(Spy(on_train_epoch_end=look),))
    return rows


def test_it_shows_params_widths_and_lambda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(
        tmp_path,
        "trainer.max_epochs=4",
        "trigger=periodic",
        "trigger.every=1",
        "callbacks.growth.until=0.3",
        "callbacks.gates.begin=0.0",
        "callbacks.gates.end=0.75",
        "callbacks.gates.penalty=2e-4",
    )
    assert [row["widths"] for row in rows] == ["4-6-6-8"] + ["6-9-9-12"] * 3
    assert [row["λ"] for row in rows] == ["2.0e-04"] * 3 + ["0.0e+00"]
    assert all(row["params"] == row["counted"] for row in rows)
    assert all({"train/loss", "train/acc", "val/acc"} <= row.keys() and "v_num" not in row for row in rows)
    assert "params: " in capsys.readouterr().out.replace("\n", " ")


def test_many_widths_are_summed(tmp_path: Path) -> None:
    run = prepare(tmp_path, *EXACT, BAR, "model=resnet20", "model.width=4", "schedule=static")
    run.trainer.strategy.connect(run.module)
    shown = run.callbacks["progress"].get_metrics(run.trainer, run.module)
    sizes = run.module.structure.widths.sizes().values()
    assert len(sizes) > 8 and shown["widths"] == f"Σ{sum(sizes)}"
    assert "λ" not in shown and "params" not in shown, "nothing has been counted yet"
