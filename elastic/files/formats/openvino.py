"""Write and run OpenVINO's files: an .xml, the weights in a .bin beside it; NNCF brings them to 8 bits."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from elastic.files.formats.interface import Format, Outputs, Run, Source

# A processor with AMX would otherwise compute in bf16.
FP32 = {"INFERENCE_PRECISION_HINT": "f32"}


def write(source: Source, path: Path) -> None:
    """Write the network, and each entry of what is said of it under `elastic` of its `rt_info`."""
    import openvino

    model = openvino.convert_model(source.make_program(Dim("batch")))
    sizes = zip(source.example, source.has_batch, strict=True)
    shapes = [[-1, *x.shape[1:]] if has_batch else [*x.shape] for x, has_batch in sizes]
    model.reshape({model.input(k): shape for k, shape in enumerate(shapes)})
    if source.calibration:
        model = quantize(model, source)
    for name, text in source.texts.items():
        model.set_rt_info(text, ["elastic", name])
    openvino.save_model(model, path, compress_to_fp16=False)


def quantize(model: Any, source: Source) -> Any:
    """Bring weights and activations to 8 bits."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    data = nncf.Dataset([tuple(x.numpy() for x in inputs) for inputs in source.calibration])
    return nncf.quantize(model, data, subset_size=len(source.calibration))


def open_file(path: Path, threads: int | None = None) -> Run:
    """Open a file in OpenVINO, in fp32."""
    import openvino

    options = FP32 if threads is None else {**FP32, "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(path, "CPU", options)

    def run(*inputs: Tensor) -> Outputs:
        result = compiled([x.numpy() for x in inputs])
        return [torch.from_numpy(result[output].copy()) for output in compiled.outputs]

    return run


OPENVINO = Format("openvino", ("openvino", "nncf"), write, open_file)
