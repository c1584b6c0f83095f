"""Files for other programs: the same outputs, at any batch size, or no file."""

from pathlib import Path

import pytest
import torch
from torch import nn

from elastic.errors import StructureError
from elastic.files import exporting as exporting
from elastic.files.exporting import export
from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes
from elastic.models import convnet, resnet20
from elastic.pruning.compaction import compact
from elastic.pruning.gates import attach_gates, iterate_gates
from elastic.widths.discovery import discover
from tests.elastic.zoo import randomised

X = torch.randn(1, 3, 8, 8)


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x).detach()
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_levels_in_place_are_levels_exported(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = randomised(resnet20(4)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    widths = discover(net, X)
    levels = Levels(net, widths, level_sizes(net, widths, X, [0.5]))
    x = torch.randn(5, 3, 8, 8)
    for k, level in enumerate(levels):
        export(level, X, tmp_path / f"level{k}{suffix}")
        with torch.no_grad():
            expected = level.eval()(x)
        torch.testing.assert_close(run(tmp_path / f"level{k}{suffix}", x), expected, atol=1e-5, rtol=1e-5)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_gated_network_is_as_its_compacted_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = randomised(convnet((6, 6, 6, 6), in_channels=3))
    attach_gates(net, discover(net, X), "channel")
    for _, _, gate in iterate_gates(net):
        gate.score.data[::2] = -1
    export(compact(net, X), X, tmp_path / "small.pt2")
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "small.pt2", X), net.eval()(X), atol=1e-5, rtol=1e-5)


def test_what_would_differ_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        exporting, "_pt2", lambda program, part, probe: part.write_text("x") + torch.ones(3, 10)
    )
    with pytest.raises(StructureError, match="would differ from the network by"):
        export(convnet(in_channels=3), X, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match=r"name a file that ends in .pt2 or .onnx"):
        export(nn.Identity(), X, tmp_path / "net.pth")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(StructureError, match="onnxruntime is not installed: install the extra `export`"):
        export(convnet(in_channels=3), X, tmp_path / "net.onnx")
