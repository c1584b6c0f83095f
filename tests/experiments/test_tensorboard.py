"""A run logged for TensorBoard, read back: numbers as they happen, images large enough, what has changed."""

from pathlib import Path

import pytest

from elastic.experiments.train import train
from tests.runs import TINY, configure

pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
pytestmark = pytest.mark.slow
CHANGING = (
    *(*TINY, "experiment=smoke", "logger=tensorboard", "trainer.max_epochs=4"),
    *("trigger=periodic", "trigger.every=2", "callbacks.growth.until=0.9", "callbacks.gates.begin=0.0"),
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own
def test_what_w_and_b_shows_is_there(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(configure(tmp_path, *CHANGING), tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"train/loss_step", "val/acc", "gates/penalty", "size/params"} <= set(tags["scalars"])
    widths = [tag for tag in tags["scalars"] if tag.startswith("widths/")]
    assert any(len({event.value for event in board.Scalars(tag)}) > 1 for tag in widths)
    assert {"samples", "widths over time"} <= set(tags["images"])
    assert board.Images("samples")[0].width >= 64 and "gates/score" in tags["histograms"]
    texts = {tag.removesuffix("/text_summary"): board.Tensors(tag) for tag in tags["tensors"]}
    assert b"grow" in texts["timeline"][0].tensor_proto.string_val[0]
    assert b"test/acc" in texts["summary"][0].tensor_proto.string_val[0]
