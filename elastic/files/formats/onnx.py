"""Write ONNX files and run them by ONNX Runtime, which also brings them to 8 bits."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from elastic.files.formats.interface import Format, Inputs, Outputs, Run, Source


def write(source: Source, path: Path) -> None:
    """Write the network, and each entry of what is said of it into the metadata."""
    import onnx

    program = source.make_program(Dim("batch"))
    # The program knows the batch axis as a symbol of torch's own making; named here, so it is in the file.
    first = source.has_batch.index(True)  # others have the same axis
    axes = tuple({0: "batch"} if k == first else {} for k in range(len(source.example)))
    exported = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=axes)
    assert exported is not None
    exported.save(path)
    if source.calibration:
        quantize(path, source)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, source.texts)
    onnx.save(model, path)


def quantize(path: Path, source: Source) -> None:
    """Bring weights and activations of a file to 8 bits, a scale a channel."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        quant_pre_process,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, Any]] = (feed(inputs) for inputs in source.calibration)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    feed = make_feed(open_session(path, 1))
    with _log_errors_alone():
        quant_pre_process(path, path)
        quantize_static(path, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)


@contextmanager
def _log_errors_alone() -> Iterator[None]:
    """Leave out the advice of ONNX Runtime, which it gives by the root's logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def open_session(path: Path, threads: int | None) -> Any:
    """Open a file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def make_feed(session: Any) -> Callable[[Inputs], dict[str, Any]]:
    """Return what gives inputs the names that a file has for them."""
    names = [entry.name for entry in session.get_inputs()]
    return lambda inputs: {name: x.numpy() for name, x in zip(names, inputs, strict=True)}


def open_file(path: Path, threads: int | None = None) -> Run:
    """Open a file in ONNX Runtime."""
    session = open_session(path, threads)
    feed = make_feed(session)

    def run(*inputs: Tensor) -> Outputs:
        return [torch.from_numpy(output) for output in session.run(None, feed(inputs))]

    return run


ONNX = Format("export", ("onnxruntime", "onnxscript"), write, open_file)
