"""Write and run ExecuTorch's files, for XNNPACK, which are for phones and small devices."""

from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from elastic.files.formats.interface import Format, Outputs, Run, Source, trace
from elastic.widths.inputs import split_batch

BATCH = 64  # memory is planned for as many inputs at once


def write(source: Source, path: Path) -> None:
    """Write the network, with a method for each entry of what is said of it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    axis = Dim("batch", max=BATCH)
    program = source.make_program(axis, BATCH)
    if source.calibration:
        program = quantize(program, source, axis)
    about = {f"about_{name}": text for name, text in source.texts.items()}
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=about)
    path.write_bytes(edge.to_executorch().buffer)


def quantize(program: ExportedProgram, source: Source, axis: Dim) -> ExportedProgram:
    """Bring weights and activations to 8 bits, a scale a channel."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    module = prepare_pt2e(program.module(), quantizer)
    for inputs in source.calibration:
        module(*inputs)
    return trace(convert_pt2e(module), source.repeat_example(BATCH), source.name_axes(axis))


def open_file(path: Path, threads: int | None = None) -> Run:
    """Open a file in ExecuTorch's runtime."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if threads is not None:
        portable_lib._unsafe_reset_threadpool(threads)
    contents = path.read_bytes()
    program = Runtime.get().load_program(contents)
    method = program.load_method("forward")
    assert method is not None

    def run(*inputs: Tensor) -> Outputs:
        assert contents and program  # which the method refers to, without keeping them
        batches = [[x.contiguous() for x in batch] for batch in split_batch(inputs, BATCH)]
        parts = [[y.clone() for y in method.execute(batch)] for batch in batches]
        return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]

    return run


EXECUTORCH = Format("executorch", ("executorch.exir", "torchao"), write, open_file)
