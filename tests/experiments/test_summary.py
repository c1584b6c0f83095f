"""The summary, the table and the picture of a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from elastic.data import Digits
from elastic.experiments.tools.about import describe_run
from elastic.experiments.tools.figure import draw_history
from elastic.experiments.tools.summary import (
    measure_metrics,
    measure_network,
    show,
    summarise,
    write_summary,
)
from elastic.experiments.train import build, train
from elastic.files.cards import write_card
from elastic.files.network import Network
from elastic.files.sums import SUMS, check_sum
from elastic.models import convnet
from elastic.training.tasks import Classification
from tests.fitted import EXACT
from tests.runs import TINY, configure


@pytest.fixture(autouse=True, scope="module")
def no_picture() -> None:
    """Draw it: here it is tested."""


PRUNING = (
    *TINY,
    "experiment=smoke",
    "trainer.max_epochs=6",
    "data.batch_size=64",
    "callbacks.gates.begin=0.0",
    "callbacks.gates.end=0.7",
    "callbacks.gates.penalty=0.1",
    "optimizer.lr=3e-2",
)
TYPES: dict[str, type] = {
    "experiment": str,
    "seed": int,
    "data": str,
    "model": str,
    "schedule": str,
    "test/acc": float,
    "params": int,
    "params_dense": int,
    "macs": int,
    "macs_dynamic": int,
    "levels": list,
    "wall_s": float,
    "torch": str,
    "elastic": str,
    "lightning": str,
}
"""Of DESIGN.md, part 6."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(configure(folder, *PRUNING, "seed=4"), folder)
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def test_the_summary_is_flat_and_complete(finished: Path) -> None:
    summary = summary_of(finished)
    for key, kind in TYPES.items():
        assert type(summary[key]) is kind, key
    assert all(not isinstance(value, dict) for value in summary.values())
    assert (summary["experiment"], summary["seed"], summary["data"]) == ("smoke", 4, "digits")
    assert (summary["model"], summary["schedule"]) == ("convnet", "growth+gates")
    assert 0 <= summary["test/acc"] <= 1 and summary["wall_s"] > 0
    assert 0 < summary["params"] <= summary["params_dense"]
    assert summary["torch"] == torch.__version__
    assert summary["git"] is None or len(summary["git"]) >= 7, "of a copy without history there is none"


def test_params_are_the_non_zeros_in_the_file(finished: Path) -> None:
    """Counted on the tensors of the file that are parameters: buffers are left out."""
    module, _ = build(configure(finished / "again", *PRUNING))
    plain = Network.load(finished / "model.safetensors", module.net, module.structure.example).plain()
    parameters = dict(plain.named_parameters())
    assert not [name for name in parameters if "running" in name]
    found = {name: t for name, t in plain.state_dict().items() if name in parameters}
    summary = summary_of(finished)
    assert sum(int(np.count_nonzero(t.numpy())) for t in found.values()) == summary["params"]
    assert sum(t.numel() for t in found.values()) == summary["params_dense"]
    assert summary["params"] < summary["params_dense"]


def test_macs_are_those_of_the_compacted_network_by_hand(finished: Path) -> None:
    module, _ = build(configure(finished / "again", *PRUNING))
    plain = Network.load(finished / "model.safetensors", module.net, module.structure.example).plain()
    convs = [m for m in plain if isinstance(m, torch.nn.Conv2d)]  # type: ignore[union-attr]
    positions = (64, 64, 16, 16)
    macs = sum(n * c.weight.numel() for n, c in zip(positions, convs, strict=True)) + plain[-1].weight.numel()  # type: ignore[index,operator]
    assert summary_of(finished)["macs"] == macs


def test_the_summary_tells_the_budget_asked_from_what_was_got(tmp_path: Path) -> None:
    budget = "callbacks.gates.budget={_target_: elastic.pruning.Budget, target: 777}"
    summary = train(configure(tmp_path, *PRUNING, "trainer.max_epochs=2", budget), tmp_path)
    assert summary["budget/target"] == 777
    assert summary["budget/actual"] == summary["params"]
    assert summary_of(tmp_path) == summary


@pytest.mark.parametrize(
    ("schedule", "named"),
    [
        ("static", "static"),
        ("[ema,gates,growth]", "growth+gates+ema"),
        ("[magnitude]", "magnitude"),
        ("[magnitude,growth]", "growth+magnitude"),
        ("[distil,dynamic]", "dynamic+distil"),
    ],
)
def test_the_summary_names_the_schedule_in_one_order(tmp_path: Path, schedule: str, named: str) -> None:
    found = summarise(configure(tmp_path, f"schedule={schedule}"), 3, {}, 1.25, 10**12)
    assert found["schedule"] == named
    assert (found["wall_s"], found["macs_training"]) == (1.2, 10**12)


def test_what_nothing_has_counted_is_no_number(tmp_path: Path) -> None:
    given = (*EXACT, "schedule=static", "trainer.max_epochs=2", "callbacks.census=null")
    summary = train(configure(tmp_path, *given), tmp_path)
    assert summary["epochs"] == 2 and summary["wall_s"] is None and summary["macs_training"] is None


def test_the_accuracy_is_that_of_the_images_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = convnet((4, 4)).eval()
    _, data = build(configure(tmp_path, *PRUNING, "data.batch_size=100"))
    (found,) = measure_metrics(net, data, Classification(10)).values()
    x_BCHW, y_B = data.test_set.__getitems__(list(range(360)))  # type: ignore[union-attr]
    with torch.no_grad():
        right = net(data.normalise(x_BCHW.float() / 255)).argmax(1) == y_B
    assert found == pytest.approx(right.float().mean().item(), abs=1e-6)


def test_measuring_leaves_the_network_alone(tmp_path: Path) -> None:
    net = convnet((4, 4)).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    _, data = build(configure(tmp_path, *PRUNING))
    measure_network(Network(net), data, Classification(10))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_summary_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_summary({"seed": 1}, tmp_path)

    def full(self: Path, text: str, *_: Any, **__: Any) -> int:
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_summary({"seed": 2}, tmp_path)
    monkeypatch.undo()
    assert json.loads((tmp_path / "summary.json").read_text()) == {"seed": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", SUMS}
    check_sum(tmp_path / "summary.json")


def test_the_table_shows_start_largest_and_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    summary = {
        "experiment": "e",
        "seed": 3,
        "schedule": "grow",
        "params": 50,
        "params_dense": 60,
        "macs": 700,
    }
    history = [
        {"params": 100, "params_dense": 110, "macs": 1200},
        {"params": 1300, "params_dense": 1400, "macs": 15000},
        {"params": 160, "params_dense": 170, "macs": 1800},
    ]
    show(summary | {"test/acc": 0.98765, "epochs": 3, "wall_s": 4.0}, history, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    rows = {
        cells[0]: cells[1:] for line in lines if len(cells := [c.strip() for c in line.split("│")[1:-1]]) == 4
    }
    assert rows["params"] == ["100", "1,300", "50"]
    assert rows["params_dense"] == ["110", "1,400", "60"]
    assert rows["macs"] == ["1,200", "15,000", "700"]
    assert rows["test accuracy"] == ["", "", "98.77%"]


# --- the picture --------------------------------------------------------------------------------------------


def history(epochs: int, widths: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            **{f"{part}/acc": epoch / epochs for part in ("train", "val")},
            **{"params": 100 + epoch, "params_dense": 200 + epoch, "macs": 1000},
            "widths": {f"layer{i}": 4 + epoch for i in range(widths)},
        }
        for epoch in range(epochs)
    ]


def grown(*epochs: int) -> list[dict[str, Any]]:
    return [{"epoch": e, "why": "grow: val/acc saturated", "width": "0"} for e in epochs]


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("epochs", "timeline", "widths"), [(1, grown(0), 20), (60, [], 4)])
def test_the_picture_can_be_opened(
    tmp_path: Path, epochs: int, timeline: list[dict[str, Any]], widths: int
) -> None:
    draw_history(history(epochs, widths), timeline, tmp_path / "h.png")
    pixels_HWC = opened(tmp_path / "h.png")
    assert pixels_HWC.shape == (840, 840, 3)
    assert len(np.unique(pixels_HWC.reshape(-1, 3), axis=0)) > 50
    assert [p.name for p in tmp_path.iterdir()] == ["h.png"]


def test_the_picture_shows_growth_and_not_pruning(tmp_path: Path) -> None:
    pruned = [{"epoch": 3, "why": "prune: channels without effect", "width": "0"}]
    for name, timeline in (("none", []), ("grown", grown(3)), ("pruned", pruned)):
        draw_history(history(6), timeline, tmp_path / f"{name}.png")
    none, with_growth, with_pruning = (
        opened(tmp_path / f"{name}.png") for name in ("none", "grown", "pruned")
    )
    assert (none != with_growth).any() and (none == with_pruning).all()


def test_the_picture_bears_what_may_be_missing(tmp_path: Path) -> None:
    """No validation figures; nothing left but zeros; no error in training."""
    rows = [{**row, "params": 0, "train/acc": 1.0} for row in history(3)]
    for row in rows:
        del row["val/acc"]
    draw_history(rows, [], tmp_path / "h.png")
    assert opened(tmp_path / "h.png").shape == (840, 840, 3)


def test_no_epochs_no_picture(tmp_path: Path) -> None:
    draw_history([], [], tmp_path / "h.png")
    assert list(tmp_path.iterdir()) == []


def test_the_runs_own_picture(finished: Path) -> None:
    assert opened(finished / "history.png").shape == (840, 840, 3)


def test_a_file_says_its_licence_and_what_its_run_began_with() -> None:
    content = {
        "model": {"_target_": "elastic.models.convnet", "channels": [4, 6]},
        "init": "runs/first-seed0/",
        "licence": "MIT",
        "callbacks": {"distil": {"teacher": {"run": "${init}"}}},
    }
    about = describe_run(OmegaConf.create(content), Digits(), {"seed": 0, "test/acc": 0.5})
    assert about["licence"] == "MIT" and about["model"]["options"]["channels"] == [4, 6]
    assert about["made"] == {"seed": 0, "init": "first-seed0", "teacher": "first-seed0"}
    card = write_card("name", about)
    assert "license: mit" in card and "| Started from | first-seed0 |" in card
    alone = describe_run(OmegaConf.create(content | {"init": None, "licence": None}), Digits(), {})
    assert alone["made"] == {} and "licence" not in alone
