"""Files for other programs: the same outputs, at any batch size, or no file."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import elastic
from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.modules import iterate_modules
from elastic.errors import ElasticError, FileError, OptionError, StructureError
from elastic.files.exporting import TOLERANCE, export, open_exported
from elastic.files.formats import FORMATS, Run
from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes
from elastic.models import convnet, resnet20
from elastic.pruning.compaction import compact
from elastic.pruning.gates import attach_gates, iterate_gates
from elastic.widths.discovery import discover
from elastic.widths.leaves import list_tensors
from tests.elastic.widths.checks import assert_finite
from tests.elastic.widths.odd import between
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


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
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


def answer(patch: pytest.MonkeyPatch, outputs: list[torch.Tensor]) -> None:
    """Let every `.pt2` file give these outputs."""
    form = replace(FORMATS[".pt2"], open=lambda path, threads: lambda *inputs: outputs)
    patch.setitem(FORMATS, ".pt2", form)


def test_what_would_differ_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, [torch.ones(3, 10)])
    with pytest.raises(FileError, match="would differ from the network by"):
        export(convnet(in_channels=3), X, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_what_its_runtime_does_not_take_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, threads: int | None) -> Run:
        raise RuntimeError("error 0x1\nat a place")

    monkeypatch.setitem(FORMATS, ".pt2", replace(FORMATS[".pt2"], open=fail))
    with pytest.raises(FileError, match=r"cannot be run by its runtime \(error 0x1\): export it in fp32"):
        export(convnet(in_channels=3), X, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"name a file that ends in .pt2, .onnx, .xml, .pte or .tflite"):
        export(nn.Identity(), X, tmp_path / "net.pth")
    with pytest.raises(
        OptionError, match=r"no 8 bits: name a file that ends in .onnx, .xml, .pte or .tflite"
    ):
        export(nn.Identity(), X, tmp_path / "net.pt2", calibration=[X])
    with pytest.raises(FileError, match="there is no file"):
        open_exported(tmp_path / "net.pt2")
    (tmp_path / "net.pt2").write_text("cut short")
    with pytest.raises(FileError, match=r"net.pt2 cannot be opened \(.*\): export it again"):
        open_exported(tmp_path / "net.pt2")


@pytest.mark.parametrize(
    ("suffix", "extra"), [(".onnx", "export"), (".xml", "openvino"), (".pte", "executorch")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, extra: str
) -> None:
    package = FORMATS[suffix].packages[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FileError, match=f"is not installed: install the extra `{extra}`"):
        export(convnet(in_channels=3), X, tmp_path / f"net{suffix}")


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
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


@dataclass
class Answer:
    mean: torch.Tensor
    parts: tuple[Any, ...]
    loss: torch.Tensor | None = None


class TwoInputs(nn.Module):
    """Take signals and volumes, and return what is no plain container, with what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.signal, self.volume = nn.Conv1d(2, 4, 3), nn.Conv3d(1, 4, 1)

    def forward(self, x_BCL: torch.Tensor, x_BCDHW: torch.Tensor) -> Answer:
        mean_BC = self.signal(x_BCL).mean(2) + self.volume(x_BCDHW).mean((2, 3, 4))
        return Answer(mean_BC, (mean_BC > 0, 3))


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_several_inputs_and_other_containers_are_exported(suffix: str, tmp_path: Path) -> None:
    net, path = TwoInputs().eval(), tmp_path / f"net{suffix}"
    example = (torch.randn(1, 2, 9, requires_grad=True), torch.randn(1, 1, 2, 3, 4))
    export(net, example, path)
    for size in (1, 7):
        inputs = torch.randn(size, 2, 9), torch.randn(size, 1, 2, 3, 4)
        with torch.no_grad():
            expected = net(*inputs)
        actual = open_exported(path, 1)(*inputs)
        torch.testing.assert_close(actual, [expected.mean, expected.parts[0]], atol=1e-5, rtol=1e-5)


def test_what_load_returns_is_exported_with_what_it_says(tmp_path: Path) -> None:
    network, extra = elastic.load("digits-gnap-2k"), {"about.json": ""}
    elastic.export(network, torch.zeros(1, 1, 8, 8), tmp_path / "net.pt2")
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert json.loads(extra["about.json"]) == network.about


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_checks_of_the_data_are_left_out(suffix: str, tmp_path: Path) -> None:
    net = randomised(between(assert_finite)).eval()
    for name, checked in {"plain": net, "modules": attach_modules(net, discover(net, X)).eval()}.items():
        assert export(checked, X, tmp_path / f"{name}{suffix}") < TOLERANCE
        assert run(tmp_path / f"{name}{suffix}", torch.full_like(X, torch.nan)).isnan().all()


class Choice(nn.Module):
    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor | None:
        return x_BCHW if x_BCHW.sum() > 0 else -x_BCHW


@pytest.mark.parametrize(
    ("net", "example", "name", "about", "text"),
    [
        (convnet(in_channels=3), torch.ones(1, 1, 8, 8), "net.pt2", {}, "does not run on (1, 1, 8, 8)"),
        (convnet(in_channels=3), X[:0], "net.pt2", {}, "an example has no sample"),
        (convnet(in_channels=3), X, "none/net.pt2", {}, "make the folder"),
        (convnet(in_channels=3), X, "net.pt2", {"mean": numpy.float32(1)}, "about has a float32 as 'mean'"),
        (Choice(), X, "net.pt2", {}, "change forward there, or name another format"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of torch.export
def test_what_cannot_be_exported_is_said_in_one_line(
    net: nn.Module, example: torch.Tensor, name: str, about: Any, text: str, tmp_path: Path
) -> None:
    with pytest.raises(ElasticError) as caught:
        export(net, example, tmp_path / name, about)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_one_wrong_output_of_several_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = TwoHeads().eval()
    form = FORMATS[".pt2"]

    def open_wrong(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Run]:
        def open_file(path: Path, threads: int | None) -> Run:
            run = form.open(path, threads)

            def run_wrong(*inputs: torch.Tensor) -> list[torch.Tensor]:
                *right, last = run(*inputs)
                return [*right, change(last)]

            return run_wrong

        return open_file

    wrong: list[tuple[Callable[[torch.Tensor], torch.Tensor], str]] = [
        (lambda y: y + 9, "would differ from the network by"),
        (lambda y: y * float("nan"), "would differ from the network by nan"),
        (lambda y: y + float("inf"), "would differ from the network by inf"),
        (lambda y: y + 1j, "would differ from the network by"),
        (lambda y: y[:1], "an output would be .* in place of .*: return another"),
    ]
    for change, text in wrong:
        monkeypatch.setitem(FORMATS, ".pt2", replace(form, open=open_wrong(change)))
        with pytest.raises(ElasticError, match=text):
            export(net, X, tmp_path / "net.pt2")
        assert not list(tmp_path.iterdir())


class ForAll(nn.Module):
    """Take what is the same for all samples: a number, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3)) @ table * scale


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("samples", [1, 3])
def test_inputs_that_are_the_same_for_all_samples_are_given_whole(
    suffix: str, samples: int, tmp_path: Path
) -> None:
    net, table = ForAll(), torch.randn(5, 2)
    export(net, (X.repeat(samples, 1, 1, 1), torch.tensor(2.0), table), tmp_path / f"net{suffix}")
    x, scale = torch.randn(7, 3, 8, 8), torch.tensor(-3.0)
    with torch.no_grad():
        expected = net(x, scale, table)
    (actual,) = open_exported(tmp_path / f"net{suffix}", 1)(x, scale, table)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


class Unusual(nn.Module):
    """Return what is infinite, what is empty, and complex numbers."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        masked = x.masked_fill(torch.arange(8) > 4, float("-inf"))
        return masked, x[:, :0], torch.complex(x, 2 * x)


def test_outputs_may_be_infinite_empty_or_complex(tmp_path: Path) -> None:
    assert export(Unusual(), X, tmp_path / "net.pt2") == 0
    actual = open_exported(tmp_path / "net.pt2")(X)
    torch.testing.assert_close(actual, list(Unusual()(X)), atol=0, rtol=0)


def test_levels_are_exported_as_the_largest_of_them(tmp_path: Path) -> None:
    net = convnet((4, 6), in_channels=3)
    widths = discover(net, X)
    export(Levels(net, widths, level_sizes(net, widths, X, [0.5])), X, tmp_path / "net.pt2")
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "net.pt2", X), net.eval()(X), atol=1e-5, rtol=1e-5)


def test_what_a_file_does_not_take_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    export(convnet((4, 6), in_channels=3), X, "~/net.pt2")
    run = open_exported("~/net.pt2")
    for inputs in [(X, X), (), (X[:, :1],), (X.double(),)]:
        with pytest.raises(
            StructureError, match=r"net.pt2 does not run on .*: give inputs as those"
        ) as caught:
            run(*inputs)
        assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match="calibration is one tensor: give a list of batches"):
        export(convnet(in_channels=3), X, tmp_path / "net.onnx", calibration=X)


# --- every format whose extra is installed ------------------------------------------------------------------

RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino", ".pte": "executorch", ".tflite": "litert_torch"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
@pytest.mark.parametrize("suffix", RUNTIMES)
def test_a_network_comes_back_from_every_format(suffix: str, tmp_path: Path) -> None:
    """Plain, masked, and in 8 bits, where it hardly differs; what a program logs goes on being shown."""
    pytest.importorskip(RUNTIMES[suffix], reason=f"the extra for {suffix} is not installed")
    torch.manual_seed(0)
    net = randomised(convnet((6, 6), in_channels=3)).eval()
    dynamic = attach_modules(net, discover(net, X)).eval()
    x = torch.randn(5, 3, 8, 8)
    for k, each in enumerate((net, dynamic)):
        path = tmp_path / f"net{k}{suffix}"
        assert export(each, X, path, {"mean": [0.5]}) <= TOLERANCE
        with torch.no_grad():
            torch.testing.assert_close(open_exported(path, 1)(x), [each(x)], atol=1e-5, rtol=1e-5)
    batches = list(torch.randn(4, 16, 3, 8, 8))
    level = logging.getLogger().level
    difference = export(net, X, tmp_path / f"small{suffix}", calibration=batches)
    assert TOLERANCE < difference < 0.3 and logging.getLogger().level == level


ALONE = """
import sys
sys.modules["elastic"] = None  # cannot be imported
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
images = numpy.load(sys.argv[2])
numpy.save(sys.argv[3], session.run(None, {session.get_inputs()[0].name: images})[0])
assert "torch" not in sys.modules and "1" in session.get_modelmeta().custom_metadata_map["input"]
"""


def test_a_process_without_this_package_runs_what_was_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network = elastic.load("digits-gnap-2k")
    x = torch.randn(7, 1, 8, 8)
    elastic.export(network.plain(), x, tmp_path / "net.onnx", network.about)
    numpy.save(tmp_path / "x.npy", x.numpy())
    paths = [str(tmp_path / name) for name in ("net.onnx", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-I", "-c", ALONE, *paths], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = network.plain()(x)
    torch.testing.assert_close(
        torch.from_numpy(numpy.load(tmp_path / "y.npy")), expected, atol=1e-4, rtol=1e-4
    )
