"""Run a network in the runtimes that people use on a CPU, to time others beside them."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic.dynamic.skipping import make_masked
from elastic.errors import FileError
from elastic.experiments.tools.timing import make_stock
from elastic.files.exporting import export, open_exported
from elastic.measure.timing import Network as Execution
from elastic.measure.timing import choose_fastest
from elastic.training.compilation import compile_network

RUNTIMES = {"ONNX Runtime": ".onnx", "OpenVINO": ".xml"}
PYTORCH = "PyTorch"


def make_rivals(net: nn.Module, inputs: Sequence[Tensor], threads: int) -> dict[str, Execution]:
    """Make the executions of a dense network in other hands, the fastest of PyTorch's own first.

    PyTorch's are eager, as it is and folded in both memory formats, and compiled. A runtime that is not
    installed is left out. All are to be called on so many threads.
    """
    folded = make_masked(net, torch.contiguous_format)
    compile_network(folded)
    ways: list[Execution] = [*make_stock(net).values(), folded]
    return {PYTORCH: choose_fastest(ways, inputs[:1])} | _open_runtimes(net, inputs[0], threads)


def _open_runtimes(net: nn.Module, example: Tensor, threads: int) -> dict[str, Execution]:
    runtimes: dict[str, Execution] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, ending in RUNTIMES.items():
            path = Path(folder, f"network{ending}")
            try:
                export(net, example, path)
                runtimes[name] = unpack(open_exported(path, threads))
            except FileError as error:
                print(error)
    return runtimes


def unpack(execution: Callable[[Tensor], Sequence[Tensor]]) -> Callable[[Tensor], Any]:
    """Let a runtime, which lists outputs, give the only one."""

    def run(x_BCHW: Tensor) -> Tensor:
        (y_BK,) = execution(x_BCHW)
        return y_BK

    return run
