"""Runs of all tasks, from their configuration to what they leave: measured again, compared, exported."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.regression import R2Score

from elastic.errors import OptionError, TrainingError
from elastic.experiments.compare import compare_runs
from elastic.experiments.evaluate import evaluate
from elastic.experiments.export import export_run
from elastic.experiments.tools.per_image import read_test_batches
from elastic.experiments.tools.restore import restore
from elastic.experiments.train import train
from elastic.training.tasks import Classification, Multilabel, Regression, Segmentation, Task
from tests.runs import TINY, configure

FRACTIONS = "callbacks.joint.fractions=[0.5]"
RUNS = {
    "multilabel": ("data=shapes_labels", "schedule=[growth,gates]", "callbacks.gates.budget=900"),
    "segmentation": ("data=shapes_masks", "model=unet", "model.width=4", "schedule=joint", FRACTIONS),
    "regression": ("data=shapes_places", "schedule=dynamic"),
}
QUICK = (*TINY, "trainer.max_epochs=2", "data.batch_size=200", "optimizer.lr=1e-2")


def compute_by_hand(task: str, outputs: Tensor, targets: Tensor) -> float:
    if task == "multilabel":
        return ((outputs > 0) == targets.bool()).double().mean().item()
    if task == "segmentation":
        return (outputs.argmax(1) == targets).double().mean().item()
    residual, spread = (outputs - targets).square().sum(), (targets - targets.mean()).square().sum()
    return (1 - residual / spread).item()


@pytest.fixture(
    scope="module",
    params=[t if t == "segmentation" else pytest.param(t, marks=pytest.mark.slow) for t in RUNS],
)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("tasks") / f"{request.param}-seed0"
    train(configure(folder, *QUICK, f"task={request.param}", *RUNS[request.param]), folder)
    return request.param, folder


def test_a_run_of_any_task_is_measured_by_its_metric_again(finished: tuple[str, Path]) -> None:
    task, folder = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert evaluate(folder) == summary
    run = restore(folder)
    net = run.network.dynamic() if run.network.sets else run.network.plain()
    batches = read_test_batches(run.data)
    with torch.no_grad():
        outputs = torch.cat([net.eval()(x_BCHW) for x_BCHW, _ in batches])
    by_hand = compute_by_hand(task, outputs, torch.cat([targets for _, targets in batches]))
    key = "test/r2" if task == "regression" else "test/acc"
    assert summary[key] == pytest.approx(by_hand, abs=1e-5)
    assert all(key in row for row in (*summary["levels"], *summary["sets"]))


def test_runs_of_any_task_are_compared_by_their_metric(
    finished: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, folder = finished
    page, picture, table = (tmp_path / name for name in ("page.html", "arms.png", "arms.csv"))
    compare_runs(str(folder.parent / "*-seed*"), csv=table, figure=picture, html=page)
    head = "test r2" if task == "regression" else "test acc (%)"
    assert head in capsys.readouterr().out and head in page.read_text()
    assert table.read_text().count("\n") >= 2 and picture.stat().st_size > 5_000


@pytest.mark.slow
def test_a_run_of_any_task_is_exported(finished: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = finished
    export_run(folder, tmp_path / "net.pt2")
    run = restore(folder)
    net = run.network.dynamic() if run.network.sets else run.network.plain()
    x_BCHW = torch.randn(3, *run.data.shape)
    with torch.no_grad():
        exported = torch.export.load(tmp_path / "net.pt2").module()(x_BCHW)
        torch.testing.assert_close(exported, net.eval()(x_BCHW), rtol=1e-4, atol=1e-5)


class Absolute(Task):
    """Learn values by their absolute differences."""

    outputs = "values"

    def __init__(self, classes: int, metric: str = "explained") -> None:
        super().__init__(classes, metric)

    def compute_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()

    def make_metrics(self) -> Mapping[str, Metric]:
        return {"explained": R2Score()}

    def predict(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.flatten(), targets.flatten()


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    own = ("~task", f"+task={{_target_: {__name__}.Absolute, metric: explained}}")
    summary = train(configure(tmp_path, *QUICK, *own, "data=shapes_places"), tmp_path)
    assert {"val/explained", "test/explained"} <= summary.keys() and "test/acc" not in summary
    module_loss = Absolute(1).compute_loss(torch.zeros(2, 1), torch.ones(2, 1))
    assert module_loss == 1


def test_targets_of_another_kind_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="set task=multilabel") as refusal:
        train(configure(tmp_path, *QUICK, "data=shapes_labels"), tmp_path)
    assert "\n" not in str(refusal.value) and not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "named"),
    [
        (Classification(4), torch.zeros(2, 4), torch.zeros(2, 4), "task=multilabel"),
        (Classification(4), torch.zeros(2, 4), torch.zeros(2, 4).long(), "task=multilabel"),
        (Classification(4), torch.zeros(2, 4), torch.zeros(2), "task=regression"),
        (Classification(4), torch.zeros(2, 4), torch.zeros(2, 8, 8).long(), "task=segmentation"),
        (Multilabel(4), torch.zeros(2, 4), torch.zeros(2).long(), "task=classification"),
        (Segmentation(4), torch.zeros(2, 4), torch.zeros(2, 8, 8).long(), "model=unet"),
        (
            Segmentation(4),
            torch.zeros(2, 4, 8, 8),
            torch.zeros(2).long(),
            "segmentation takes a class number",
        ),
        (Regression(4), torch.zeros(2, 4), torch.zeros(2).long(), "task=classification"),
        (Regression(4), torch.zeros(2, 4), torch.zeros(2, 3), "as many floating-point values"),
    ],
)
def test_a_task_names_what_takes_other_targets(
    task: Task, outputs: Tensor, targets: Tensor, named: str
) -> None:
    with pytest.raises(TrainingError, match=named):
        task.compute_loss(outputs, targets)


def test_a_metric_that_a_task_has_not_is_refused() -> None:
    with pytest.raises(OptionError, match="Segmentation has no metric 'f1': set acc or iou"):
        Segmentation(2, metric="f1")


def test_values_of_one_output_may_have_no_dimension_for_it() -> None:
    outputs, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0])
    assert Regression(1).compute_loss(outputs, targets) == 2
