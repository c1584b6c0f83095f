"""Time what skips, and levels, beside the runtimes that people use on a CPU.

    python -m experiments.runtimes [page=docs/runtimes.md] [images=192]

The tables, with the hardware and the versions, are put between two marks of docs/runtimes.md. Dense networks
are run by PyTorch, ONNX Runtime and OpenVINO (extras `export` and `openvino`), all in turn in one process.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torchvision.models import convnext_tiny, resnet18

from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.modules import iterate_modules
from elastic.dynamic.skipping import make_skipping
from elastic.dynamic.skipping.convolution import ActiveConv2d
from elastic.errors import FileError
from elastic.experiments.formats import describe_machine
from elastic.experiments.latency import list_cells, measure_rows
from elastic.experiments.results import ROOT
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.nested import make_levels
from elastic.experiments.tools.options import call
from elastic.experiments.tools.per_image import sample_images
from elastic.experiments.tools.restore import restore
from elastic.experiments.tools.rivals import make_rivals
from elastic.experiments.tools.tables import check_marks, format_markdown, write_between_marks
from elastic.levels import extract_level, make_alone
from elastic.measure.timing import Network as Execution
from elastic.measure.timing import measure_medians_ms
from elastic.models import resnet20, vgg16_bn
from elastic.pruning.compaction import compact
from elastic.pruning.gates import Grain, attach_gates, iterate_gates, list_firsts, set_score
from elastic.widths.discovery import discover

PAGE = ROOT / "docs" / "runtimes.md"
RECORDED = ("convnet-long-seed0", "resnet20-distil-seed0", "resnet20_grown-distil-seed0")
IMAGES, REPEATS = 192, 50
GRAINS: tuple[Grain, ...] = ("kernel", "block")  # of gates
OPEN = (0.5, 0.25)  # parts of them that are
# Channels, kernels, size, stride, rows: of ResNet-20, VGG-16, and ResNet-18 at 224 pixels.
SHAPES = (
    *((3, 16, 3, 1, 32), (16, 16, 3, 1, 32), (16, 32, 3, 2, 32), (32, 32, 3, 1, 16), (64, 64, 3, 1, 8)),
    *(
        (64, 64, 3, 1, 32),
        (128, 128, 3, 1, 16),
        (256, 256, 3, 1, 8),
        (512, 512, 3, 1, 4),
        (512, 512, 3, 1, 2),
    ),
    *((3, 64, 7, 2, 224), (64, 64, 3, 1, 56), (64, 128, 1, 2, 56), (128, 256, 3, 2, 28), (512, 512, 3, 1, 7)),
)


class Subject(NamedTuple):
    """Hold a dynamic network, its dense one, and images for it."""

    name: str
    net: nn.Module
    dynamic: fx.GraphModule
    images_NCHW: Tensor


def show_runtimes(page: Path = PAGE, images: int = IMAGES, threads: int = 2) -> None:
    """Time networks of which kernels are skipped, their layers, levels, and gates, beside dense runtimes.

    Args:
        page: with marks, between which the tables are written.
        images: of each network, a third of them at 224 pixels.
        threads: the most that are tried.

    Raises:
        FileError: there is no such page, or it has no such marks.
    """
    check_marks(page, "runtimes")
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    parts = [
        f"{describe_machine()} In fp32; times are medians, in milliseconds, on one thread of processor time."
    ]
    for subject in list_subjects(images):
        rows = [list_cells(row) for row in measure_rows(*subject[1:], range(1, threads + 1))]
        parts += _show(f"**{subject.name}**", rows)
    parts += _show("**Layers**, dense, one image, one thread", list_layers())
    parts += _show("**Levels**, one image, one thread", list_levels())
    parts += _show("**Gates** shut at random, one image, one thread", list_grains())
    write_between_marks(page, "runtimes", "\n\n".join(parts))


def _show(title: str, rows: Sequence[dict[str, str]]) -> list[str]:
    parts = [title, format_markdown(list(rows[0]), [list(row.values()) for row in rows])]
    print(*parts, sep="\n\n", flush=True)
    return parts


def list_subjects(images: int) -> Iterator[Subject]:
    """List the recorded networks, as far as their data is here, and some that are untrained."""
    for name in RECORDED:
        try:
            finished = restore(ROOT / "experiments" / "dynamic_pruning" / name)
            images_NCHW = sample_images(finished.data, images)
        except FileError as error:
            print(error)
            continue
        yield Subject(name, finished.network.plain(), finished.network.dynamic(), images_NCHW)
    yield _attach("ResNet-20, untrained", resnet20(), torch.randn(images, 3, 32, 32))
    yield _attach("VGG-16-BN, untrained", vgg16_bn(), torch.randn(images, 3, 32, 32))
    large_NCHW = torch.randn(images // 3, 3, 224, 224)
    yield _attach("ResNet-18, untrained", resnet18(), large_NCHW)
    yield _attach("ConvNeXt-T, untrained", convnext_tiny(), large_NCHW)


def _attach(name: str, net: nn.Module, images_NCHW: Tensor) -> Subject:
    """Attach modules that engage about half of the kernels, others for each image."""
    plain = copy.deepcopy(net.eval())
    dynamic = attach_modules(net, discover(net, images_NCHW[:1]))
    for module in iterate_modules(dynamic):
        for parameter in module.heads.parameters():
            nn.init.normal_(parameter)
    return Subject(name, plain, dynamic.eval(), images_NCHW)


def list_layers() -> list[dict[str, str]]:
    """Time each kind of layer beside PyTorch's own, and beside the product of matrices of that size."""
    torch.set_num_threads(1)
    rows = []
    for channels, kernels, size, stride, pixels in SHAPES:
        conv = nn.Conv2d(channels, kernels, size, stride, size // 2, bias=False)
        x_BCHW, out = torch.randn(1, channels, pixels, pixels), pixels // stride
        matrix, columns = torch.randn(kernels, channels * size**2), torch.randn(channels * size**2, out**2)
        stock = nn.Conv2d(channels, kernels, size, stride, size // 2, bias=False)
        stock.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        works = {
            "kernel": partial(ActiveConv2d(conv, relu=False), x_BCHW),
            "PyTorch": partial(stock, x_BCHW),
            "product": partial(torch.mm, matrix, columns),
        }
        medians = _time(list(works.values()))
        macs = kernels * channels * size**2 * out**2
        rows.append(
            {"layer": f"{channels}→{kernels}, {size}×{size}, stride {stride}, {pixels}×{pixels}"}
            | {f"{name} (ms)": f"{median:.3f}" for name, median in zip(works, medians, strict=True)}
            | {"kernel (10⁹ MACs/s)": f"{macs / medians[0] / 1e6:.0f}", "kernel ÷ PyTorch": _divide(medians)}
        )
    return rows


def _divide(medians: Sequence[float]) -> str:
    return f"{medians[0] / medians[1]:.2f}"


def _time(works: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Time work in turn, as networks are timed."""
    networks = [lambda _, work=work: work() for work in works]
    return measure_medians_ms(networks, [torch.empty(0)] * REPEATS, time.process_time)


def list_levels() -> list[dict[str, str]]:
    """Time each level in place, extracted, as fast as it runs alone, and in dense runtimes."""
    torch.set_num_threads(1)
    rows = []
    for name, net in (("ResNet-20", resnet20()), ("VGG-16-BN", vgg16_bn())):
        x_BCHW = torch.randn(1, 3, 32, 32)
        for k, level in enumerate(make_levels(net.eval(), x_BCHW)):
            alone = extract_level(level.eval()).eval()
            runs: dict[str, Execution] = {
                "in place": level,
                "extracted": alone,
                "alone": make_alone(level, x_BCHW),
                **make_rivals(alone, [x_BCHW], 1),
            }
            times, medians = _time_runs(runs, x_BCHW)
            rows.append(
                {"network": name, "level": str(k)} | times | {"in place ÷ extracted": _divide(medians)}
            )
    return rows


def _time_runs(runs: Mapping[str, Execution], x_BCHW: Tensor) -> tuple[dict[str, str], list[float]]:
    """Time executions in turn; return their cells in a table, and the numbers."""
    medians = measure_medians_ms(list(runs.values()), [x_BCHW] * REPEATS, time.process_time)
    return {f"{run} (ms)": f"{ms:.3f}" for run, ms in zip(runs, medians, strict=True)}, medians


def list_grains() -> list[dict[str, str]]:
    """Time networks whose gates are shut at random, kernel by kernel and in blocks, beside dense ones."""
    torch.set_num_threads(1)
    rows = []
    for name, net in (("ResNet-20", resnet20()), ("VGG-16-BN", vgg16_bn())):
        x_BCHW = torch.randn(1, 3, 32, 32)
        rivals = make_rivals(net.eval(), [x_BCHW], 1) | {"kernel, dense": make_skipping(net, method="kernel")}
        for grain, part in product(GRAINS, OPEN):
            sparse = make_skipping(_shut_gates(net, x_BCHW, grain, part), method="kernel")
            runs: dict[str, Execution] = rivals | {"left out": sparse}
            times, medians = _time_runs(runs, x_BCHW)
            ratio = f"{medians[-1] / min(medians[:-1]):.2f}"
            rows.append(
                {"network": name, "gates": grain, "open": str(part)} | times | {"left out ÷ best": ratio}
            )
    return rows


def _shut_gates(net: nn.Module, x_BCHW: Tensor, grain: Grain, part: float) -> nn.Module:
    """Make a copy of a network of whose gates a part, drawn at random, is open."""
    gated = copy.deepcopy(net)
    attach_gates(gated, discover(gated, x_BCHW), grain)
    for _, _, gate in iterate_gates(gated):
        is_open = torch.rand(gate.score.numel()) < part
        set_score(gate, torch.where(is_open[list_firsts(gate)], 1.0, -1.0).view(gate.score.shape))
    return compact(gated, x_BCHW)


def main() -> None:
    silence()
    call(show_runtimes)


if __name__ == "__main__":
    run(main)
