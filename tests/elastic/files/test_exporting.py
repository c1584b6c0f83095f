"""Files for other programs: the same outputs, at any batch size, or no file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.modules import iterate_modules
from elastic.errors import FileError, OptionError
from elastic.files import exporting
from elastic.files.exporting import export, list_tensors
from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes
from elastic.models import convnet, resnet20
from elastic.pruning.compaction import compact
from elastic.pruning.gates import attach_gates, iterate_gates
from elastic.widths.discovery import discover
from tests.elastic.zoo import randomised

X = torch.randn(1, 3, 8, 8)


@torch.no_grad()
def run_all(path: Path, x: torch.Tensor) -> list[torch.Tensor]:
    if path.suffix == ".pt2":
        return list_tensors(torch.export.load(path).module()(x))
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    (output,) = run_all(path, x)
    return output


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize(
    "build",
    [lambda: convnet((4, 6), in_channels=3), pytest.param(lambda: resnet20(4), marks=pytest.mark.slow)],
    ids=["convnet", "resnet20"],
)
def test_levels_in_place_are_levels_exported(
    build: Callable[[], nn.Module], suffix: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = randomised(build()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    widths = discover(net, X)
    levels = Levels(net, widths, level_sizes(net, widths, X, [0.5]))
    x = torch.randn(5, 3, 8, 8)
    export(levels[0], X, tmp_path / f"core{suffix}")
    with torch.no_grad():
        expected = levels[0].eval()(x)
    torch.testing.assert_close(run(tmp_path / f"core{suffix}", x), expected, atol=1e-5, rtol=1e-5)
    assert len(list(tmp_path.iterdir())) == 1


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
    def write(program: ExportedProgram, part: Path, probe: torch.Tensor, about: Any) -> list[torch.Tensor]:
        part.write_text("x")
        return [torch.ones(3, 10)]

    monkeypatch.setitem(exporting.WRITERS, ".pt2", (write, Dim.AUTO))
    with pytest.raises(FileError, match="would differ from the network by"):
        export(convnet(in_channels=3), X, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"name a file that ends in .pt2 or .onnx"):
        export(nn.Identity(), X, tmp_path / "net.pth")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(FileError, match="onnxruntime is not installed: install the extra `export`"):
        export(convnet(in_channels=3), X, tmp_path / "net.onnx")


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_modules_are_exported_masked(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = convnet((6, 6), in_channels=3).eval()
    dynamic = attach_modules(net, discover(net, X)).eval()
    for module in iterate_modules(dynamic):
        for parameter in module.heads.parameters():
            nn.init.normal_(parameter)
    export(dynamic, X, tmp_path / f"net{suffix}")
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        expected = dynamic(x)
        assert not torch.allclose(expected, net(x), atol=1e-3), "something is off"
    torch.testing.assert_close(run(tmp_path / f"net{suffix}", x), expected, atol=1e-5, rtol=1e-5)


class TwoHeads(nn.Module):
    """Return a dictionary with a tuple in it, not in the order of its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.small, self.large = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(4, 5)

    def forward(self, x_BCHW: torch.Tensor) -> dict[str, Any]:
        mean_BC = self.body(x_BCHW).mean((2, 3))
        return {"z": self.small(mean_BC), "a": (self.large(mean_BC), mean_BC)}


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_all_outputs_are_exported_with_a_batch_axis_of_that_name_and_what_the_file_says(
    suffix: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, path = TwoHeads().eval(), tmp_path / f"net{suffix}"
    export(net, X, path, {"mean": (0.5, 0.25), "classes": 10})
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        expected = list_tensors(net(x))
    assert [output.shape[1] for output in expected] == [2, 5, 4]
    torch.testing.assert_close(run_all(path, x), expected, atol=1e-5, rtol=1e-5)
    if suffix == ".pt2":
        extra = {"about.json": ""}
        assert torch.export.load(path, extra_files=extra).module()(x).keys() == {"z", "a"}
        assert json.loads(extra["about.json"]) == {"mean": [0.5, 0.25], "classes": 10}
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        assert session.get_modelmeta().custom_metadata_map == {"mean": "[0.5, 0.25]", "classes": "10"}
        assert [axes.shape for axes in session.get_inputs()] == [["batch", 3, 8, 8]]
        assert [axes.shape for axes in session.get_outputs()] == [["batch", 2], ["batch", 5], ["batch", 4]]


def test_one_wrong_output_of_several_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = TwoHeads().eval()

    def write(program: ExportedProgram, part: Path, probe: torch.Tensor, about: Any) -> list[torch.Tensor]:
        part.write_text("x")
        with torch.no_grad():
            return [*list_tensors(net(probe))[:2], torch.ones(3, 4)]

    monkeypatch.setitem(exporting.WRITERS, ".pt2", (write, Dim.AUTO))
    with pytest.raises(FileError, match="would differ from the network by"):
        export(net, X, tmp_path / "net.pt2")
