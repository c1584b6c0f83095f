"""Know the formats that a network is written in for other programs, by the ending of a file."""

from elastic.files.formats.executorch import EXECUTORCH
from elastic.files.formats.interface import Format, Run, Source
from elastic.files.formats.litert import LITERT
from elastic.files.formats.onnx import ONNX
from elastic.files.formats.openvino import OPENVINO
from elastic.files.formats.pt2 import PT2

FORMATS: dict[str, Format] = {
    ".pt2": PT2,
    ".onnx": ONNX,
    ".xml": OPENVINO,
    ".pte": EXECUTORCH,
    ".tflite": LITERT,
}

__all__ = ["FORMATS", "Format", "Run", "Source"]
