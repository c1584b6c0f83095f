"""Write each network of the zoo in each format, check and time it: `python -m experiments.formats`.

The tables, with the hardware and the versions, stand between two marks in docs/export.md. A format whose
extra is not installed has no column. In 8 bits, networks are calibrated on training images; the accuracy is
that on the test split.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

import elastic
from elastic.data import ImageData
from elastic.dynamic.skipping import make_skipping
from elastic.errors import ElasticError
from elastic.experiments.export import CALIBRATION, measure_run
from elastic.experiments.results import ROOT
from elastic.experiments.tools.composition import CONF
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.hardware import find_cpu
from elastic.experiments.tools.tables import replace_table
from elastic.experiments.tools.timing import TUNED_ON, make_stock
from elastic.files.exporting import export, open_exported
from elastic.files.formats import FORMATS, Run
from elastic.files.zoo import list_zoo
from elastic.measure.timing import measure_medians_ms
from elastic.training.tasks import Classification
from elastic.widths.leaves import list_tensors

PAGE = ROOT / "docs" / "export.md"
BEGIN, END = "<!-- formats: made by `python -m experiments.formats` -->", "<!-- end of formats -->"
IMAGES = 100
TESTED = 2000  # images of the test split
HERE = "PyTorch"
PACKAGES = "torch onnxruntime openvino nncf executorch litert-torch ai-edge-litert".split()
Cells = dict[str, str]


@dataclass
class Exported:
    """Hold a network, or a level, and what is known of it in each format: `.onnx`, and `.onnx int8`."""

    name: str
    net: nn.Module
    data: ImageData
    dynamic: bool
    difference: Cells = field(default_factory=dict)
    size: Cells = field(default_factory=dict)
    latency: Cells = field(default_factory=dict)
    accuracies: Cells = field(default_factory=dict)


def list_networks() -> Iterator[Exported]:
    """List the networks of the zoo, each level by itself."""
    for name in list_zoo():
        network = elastic.load(name)
        data = make_data(network.about["made"]["data"])
        for k in range(len(network)):
            net = network.dynamic(k) if network.sets else network.plain(k)
            label = f"{name}, level {k}" if len(network) > 1 else name
            yield Exported(label, net.eval(), data, network.sets > 0)


def make_data(name: str) -> ImageData:
    """Make a data set as its configuration says."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data: ImageData = instantiate(compose("config", [f"data={name}", "run=."]).data)
    data.download = False
    data.prepare_data()
    return data


def measure(exported: Exported, endings: Sequence[str], folder: Path) -> None:
    """Export a network in all formats, and measure it there."""
    example = torch.zeros(1, *exported.data.shape)
    batches = exported.data.sample(CALIBRATION, seed=0)[0].split(32)
    runs = dict(make_here(exported))
    for ending in endings:
        for calibration in ((), batches) if FORMATS[ending].has_int8 else ((),):
            column = f"{ending} int8" if calibration else ending
            path = folder / f"{'int8' if calibration else 'fp32'}{ending}"
            try:
                exported.difference[column] = f"{export(exported.net, example, path, {}, calibration):.0e}"
            except ElasticError as error:
                print(error)
                continue
            files = [path, path.with_suffix(".bin")] if ending == ".xml" else [path]
            exported.size[column] = f"{sum(file.stat().st_size for file in files) / 1e3:,.0f}"
            runs[column] = open_exported(path, threads=1)
            if calibration:
                exported.accuracies[column] = show_accuracy(runs[column], exported.data)
    exported.accuracies["fp32"] = show_accuracy(
        lambda x_BCHW: list_tensors(exported.net(x_BCHW)), exported.data
    )
    inputs = [x_1CHW.contiguous() for x_1CHW in exported.data.sample(IMAGES, seed=1)[0].split(1)]
    # In processor time, so that what else runs here counts little.
    medians = measure_medians_ms(list(runs.values()), inputs, time.process_time)
    for column, median_ms in zip(runs, medians, strict=True):
        if not column.startswith(HERE) or median_ms < float(exported.latency.get(HERE, "inf")):
            exported.latency[HERE if column.startswith(HERE) else column] = f"{median_ms:.3f}"


def make_here(exported: Exported) -> Iterator[tuple[str, Run]]:
    """Make the executions of this package, of which the fastest counts."""
    if exported.dynamic:
        samples = exported.data.sample(TUNED_ON, seed=2)[0].split(1)
        skipping = make_skipping(exported.net, samples)  # type: ignore[arg-type]
        yield HERE, lambda x_BCHW: list_tensors(skipping(x_BCHW))
        return
    for name, execution in make_stock(exported.net).items():
        yield f"{HERE} {name}", wrap(execution)


def show_accuracy(execution: Run, data: ImageData) -> str:
    accuracy = measure_run(execution, data, Classification(data.classes), "test", TESTED)
    return f"{100 * accuracy:.2f}"


def wrap(execution: Callable[[Tensor], Tensor]) -> Run:
    """Let an execution list its outputs, as exported files do."""
    return lambda x_BCHW: [execution(x_BCHW)]


def write_tables(networks: Sequence[Exported], endings: Sequence[str]) -> str:
    """Write the tables in Markdown."""
    int8 = [f"{ending} int8" for ending in endings if FORMATS[ending].has_int8]

    def write(title: str, columns: Sequence[str], pick: Callable[[Exported], Cells]) -> str:
        heads = ["", *(column.removesuffix(" int8") for column in columns)]
        rows = [
            [exported.name, *(pick(exported).get(column, "–") for column in columns)] for exported in networks
        ]
        lines = [heads, ["---", *["---:"] * len(columns)], *rows]
        return f"{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    columns = [HERE, *endings]
    return "\n\n".join(
        [
            f"{describe_machine()} Latencies are medians over {IMAGES} images, one at a time, on one "
            "thread, in processor time, all files of a network in turn in one process. "
            f"`{HERE}` is the fastest of this package's own executions, which skips kernels where the "
            "network is dynamic.",
            write("Latency in 32 bits (ms):", columns, lambda exported: exported.latency),
            write("Latency in 8 bits (ms):", [HERE, *int8], lambda exported: exported.latency),
            write(
                f"Accuracy in 8 bits, after that in 32 (%), on {TESTED:,} test images:",
                ["fp32", *int8],
                lambda exported: exported.accuracies,
            ),
            write("Largest difference of outputs in 32 bits:", endings, lambda exported: exported.difference),
            write("Size in 32 bits (kB):", endings, lambda exported: exported.size),
            write("Size in 8 bits (kB):", int8, lambda exported: exported.size),
        ]
    )


def describe_machine() -> str:
    """Say what was measured on, and with what."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{find_cpu().partition(',')[0]}; {', '.join(versions)}."


def is_installed(ending: str) -> bool:
    """Tell whether a format can be written here."""
    try:
        FORMATS[ending].require()
    except ElasticError as error:
        print(error)
        return False
    return True


def main() -> None:
    """Measure, and put the tables into docs/export.md."""
    silence()
    torch.set_num_threads(1)
    endings, networks = [ending for ending in FORMATS if is_installed(ending)], list(list_networks())
    for count, exported in enumerate(networks, start=1):  # what is known is on the page after each
        with tempfile.TemporaryDirectory() as folder:
            measure(exported, endings, Path(folder))
        print(exported.name, exported.latency, exported.accuracies, flush=True)
        PAGE.write_text(replace_table(PAGE.read_text(), write_tables(networks[:count], endings), BEGIN, END))


if __name__ == "__main__":
    run(main)
