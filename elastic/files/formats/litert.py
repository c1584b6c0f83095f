"""Write and run LiteRT's files (formerly TensorFlow Lite), which take one input at a time."""

from pathlib import Path

import torch
from torch import Tensor

from elastic.files.formats.interface import Format, Outputs, Run, Source
from elastic.widths.inputs import split_batch


def write(source: Source, path: Path) -> None:
    """Write the network; the format has no place for what is said of it."""
    import litert_torch

    litert_torch.convert(source.net, source.example).export(str(path))
    if source.calibration:
        quantize(path, source)


def quantize(path: Path, source: Source) -> None:
    """Bring weights and activations of a file to 8 bits; inputs and outputs stay fp32."""
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe

    tool = quantizer.Quantizer(str(path))
    tool.load_quantization_recipe(recipe.static_wi8_ai8())
    keep = algorithm_manager.AlgorithmName.NO_QUANTIZE
    for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        tool.update_quantization_recipe(".*", end, algorithm_key=keep)
    samples = [
        {f"args_{k}": x.numpy() for k, x in enumerate(sample)}
        for batch in source.calibration
        for sample in split_batch(batch, 1)
    ]
    path.write_bytes(tool.quantize(tool.calibrate({"serving_default": samples})).quantized_model)


def open_file(path: Path, threads: int | None = None) -> Run:
    """Open a file in LiteRT's interpreter."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=path.read_bytes(), num_threads=threads)
    interpreter.allocate_tensors()
    entries = sorted(interpreter.get_input_details(), key=lambda entry: str(entry["name"]))
    outputs = interpreter.get_output_details()

    def run_one(*inputs: Tensor) -> Outputs:
        for entry, x in zip(entries, inputs, strict=True):
            interpreter.set_tensor(entry["index"], x.numpy())
        interpreter.invoke()
        return [torch.from_numpy(interpreter.get_tensor(output["index"])) for output in outputs]

    def run(*inputs: Tensor) -> Outputs:
        answers = [run_one(*sample) for sample in split_batch(inputs, 1)]
        return [torch.cat(parts) for parts in zip(*answers, strict=True)]

    return run


LITERT = Format("litert", ("litert_torch", "ai_edge_litert"), write, open_file)
