"""Beside other runtimes: what is best there, what falls with the MACs, and the same network everywhere."""

from pathlib import Path

import pytest
import torch
from torch import nn

from elastic.errors import FileError
from elastic.experiments import latency, networks, runtimes
from elastic.experiments.latency import compare_with_best, list_cells
from elastic.experiments.tools import rivals
from elastic.models import convnet


@pytest.mark.parametrize(
    ("skipping", "macs", "saved"),
    [(1.0, 0.5, 1.0), (2.0, 0.5, 0.0), (1.5, 0.5, 0.5), (3.0, 0.5, -1.0), (0.5, 0.25, 1.0)],
)
def test_what_is_saved_is_of_the_best_dense_way_elsewhere(skipping: float, macs: float, saved: float) -> None:
    """A dense execution of our own is no rival, nor is a runtime that is not installed."""
    row = {"PyTorch": 3.0, "ONNX Runtime": 2.0, latency.KERNEL: 1.0, latency.SKIPPING: skipping, "macs": macs}
    ratios = compare_with_best(row)
    assert ratios["skipping ÷ best"] == skipping / 2 and ratios["kernel, dense ÷ best"] == 0.5
    assert ratios["saved ÷ MACs saved"] == pytest.approx(saved)
    assert list_cells({"threads": 1, "batch": 1} | row)["OpenVINO (ms)"] == "–"


@pytest.mark.slow
def test_a_runtime_that_is_missing_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise FileError("it is not installed")

    net, x_BCHW = convnet([4, 4]).eval(), torch.randn(2, 1, 8, 8)
    found = rivals.make_rivals(net, [x_BCHW], 1)
    assert set(found) >= {"PyTorch", "ONNX Runtime"}
    with torch.inference_mode():
        for execution in found.values():
            torch.testing.assert_close(execution(x_BCHW), net(x_BCHW), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(rivals, "export", refuse)
    assert list(rivals.make_rivals(net, [x_BCHW], 1)) == ["PyTorch"]
    assert "it is not installed" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_has_a_row_for_each_network_layer_level_and_grain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def list_subjects(images: int) -> list[runtimes.Subject]:
        return [runtimes._attach("tiny", convnet([6, 6]), torch.randn(images, 1, 8, 8))]

    def build() -> nn.Module:
        return convnet([8, 8], [0], 3)

    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- begin of `elastic runtimes` -->\n<!-- end of `elastic runtimes` -->\nafter\n"
    )
    monkeypatch.setattr(runtimes, "list_subjects", list_subjects)
    monkeypatch.setattr(runtimes, "SHAPES", runtimes.SHAPES[:2])
    monkeypatch.setattr(runtimes, "resnet20", build)
    monkeypatch.setattr(runtimes, "vgg16_bn", build)
    monkeypatch.setattr(latency, "BATCHES", (1, 2))
    monkeypatch.setattr(rivals, "compile_network", lambda net: None)  # it takes minutes
    runtimes.show_runtimes(page, images=4, threads=1)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    assert len(rows) == (1 + 2) + (1 + 2) + (1 + 2 * 4) + (1 + 2 * 4)


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runtimes, "list_subjects", lambda images: pytest.fail("it is timed"))
    monkeypatch.setattr(networks, "describe_network", lambda name: pytest.fail("it is discovered"))
    page = tmp_path / "page.md"
    with pytest.raises(FileError, match="is missing"):
        runtimes.show_runtimes(page)
    page.write_text("# A page")
    with pytest.raises(FileError, match="there is no place for the table"):
        runtimes.show_runtimes(page)
    with pytest.raises(FileError, match="is a folder"):
        networks.list_networks(tmp_path)
