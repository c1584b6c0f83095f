"""Write a network as a file that other programs run, and check it against the network before it is left."""

import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from elastic.errors import FileError, OptionError, StructureError
from elastic.files.atomic import write_atomically
from elastic.levels.cutting import extract_level

TOLERANCE = 1e-5  # absolute, and relative to the largest value of an output
Outputs = list[Tensor]


def export(net: nn.Module, example: Tensor, path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a network for any batch size: `.pt2` (torch.export) or `.onnx` (extra `export`).

    Its outputs may be a tensor or nested tuples, lists and dictionaries of tensors. `.pt2` gives them back as
    they are, ONNX one after the other.

    Args:
        net: plain, e.g. compacted or a level; or with kernel activation modules, which then mask kernels.
        example: an input, batch first.
        about: what the file says of the network, in plain containers: each entry as JSON in the metadata of
            ONNX, all of them as the extra file `about.json` of a `.pt2`.

    Raises:
        OptionError: a kind of file that is not known.
        FileError: outputs that differ by more than 1e-5, or a package that is missing.
    """
    if path.suffix not in WRITERS:
        raise OptionError(f"{path} cannot be written: name a file that ends in {' or '.join(WRITERS)}")
    write, batch_axis = WRITERS[path.suffix]
    net = extract_level(net).eval()  # a level's tensors are parts of others
    program = _make_program(net, example, batch_axis)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, *example.shape[1:], generator=generator)
    with torch.no_grad():
        expected = list_tensors(net(probe))

    def write_checked(part: Path) -> None:
        difference = _compare(write(program, part, probe, about or {}), expected)
        if not difference <= TOLERANCE:  # nor is NaN
            raise FileError(f"{path} would differ from the network by {difference:.1e}: export it in fp32")

    write_atomically(path, write_checked)


def _make_program(net: nn.Module, example: Tensor, batch_axis: Any) -> ExportedProgram:
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = tensor.detach().contiguous()  # other runtimes have layouts of their own
    pair = torch.cat([example, example])[:2]  # a batch of one would be taken for granted
    with warnings.catch_warnings():
        # Of what kernel activation modules note of their last input.
        warnings.filterwarnings("ignore", ".*were assigned during export", UserWarning)
        return torch.export.export(net, (pair,), dynamic_shapes=({0: batch_axis},))


def list_tensors(outputs: Any) -> Outputs:
    """List the tensors of nested tuples, lists and dictionaries, in the order of torch.export and ONNX."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _compare(actual: Outputs, expected: Outputs) -> float:
    """Measure the largest difference of outputs, relative to the largest value where that is above 1."""
    if not expected or len(actual) != len(expected):
        raise StructureError(f"{len(actual)} of {len(expected)} outputs can be written: return tensors alone")
    pairs = zip(actual, expected, strict=True)
    return max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs)


# Each writes the file, and runs the probe through what it has written.


@torch.no_grad()
def _write_pt2(program: ExportedProgram, part: Path, probe: Tensor, about: Mapping[str, Any]) -> Outputs:
    buffer = io.BytesIO()  # by name it would insist on an ending
    torch.export.save(program, buffer, extra_files={"about.json": json.dumps(dict(about))})
    part.write_bytes(buffer.getbuffer())
    buffer.seek(0)
    return list_tensors(torch.export.load(buffer).module()(probe))


def _write_onnx(program: ExportedProgram, part: Path, probe: Tensor, about: Mapping[str, Any]) -> Outputs:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch needs it
    except ImportError as error:
        raise FileError(f"{error.name} is not installed: install the extra `export`") from error
    # The program knows the batch axis as a symbol of torch's own making; named here, so it is in the file.
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},))
    assert onnx is not None
    onnx.model.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
    onnx.save(part)
    session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: probe.numpy()})
    return [torch.from_numpy(output) for output in outputs]


Writer = Callable[[ExportedProgram, Path, Tensor, Mapping[str, Any]], Outputs]
# By ending: what writes it, and how its batch axis is declared.
WRITERS: dict[str, tuple[Writer, Any]] = {
    ".pt2": (_write_pt2, Dim.AUTO),
    ".onnx": (_write_onnx, Dim("batch")),
}
