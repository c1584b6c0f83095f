"""A network as a file that other programs run, checked against the network before it is left behind."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.files.atomic import write_atomically
from elastic.levels.cutting import extract_level

TOLERANCE = 1e-5  # absolute, and relative to the largest output


def export(net: nn.Module, example: Tensor, path: Path) -> None:
    """Write a network for any batch size: `.pt2` (torch.export) or `.onnx` (extra `export`).

    Args:
        net: plain, e.g. compacted or a level.
        example: an input, batch first.

    Raises:
        StructureError: a kind of file that is not known, a package that is missing, or outputs that differ
            by more than 1e-5. Nothing is written then.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise StructureError(f"{path} cannot be written: name a file that ends in .pt2 or .onnx")
    # A level's tensors are parts of others.
    net = extract_level(net).eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    twice = torch.cat([example, example])[:2]  # a batch of one would be taken for granted
    batch = {0: torch.export.Dim.AUTO if path.suffix == ".pt2" else torch.export.Dim("batch")}
    program = torch.export.export(net, (twice,), dynamic_shapes=(batch,))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, *example.shape[1:], generator=generator)
    with torch.no_grad():
        expected = net(probe)

    def write(part: Path) -> None:
        found = (_pt2 if path.suffix == ".pt2" else _onnx)(program, part, probe)
        apart = float((found - expected).abs().max())
        if not apart <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise StructureError(f"{path} would differ from the network by {apart:.1e}: export it in fp32")

    write_atomically(path, write)


# Each writes the file, and says what it makes of the probe.


@torch.no_grad()
def _pt2(program: torch.export.ExportedProgram, part: Path, probe: Tensor) -> Tensor:
    buffer = io.BytesIO()  # by name it would insist on an ending
    torch.export.save(program, buffer)
    part.write_bytes(buffer.getbuffer())
    buffer.seek(0)
    found: Tensor = torch.export.load(buffer).module()(probe)
    return found


def _onnx(program: torch.export.ExportedProgram, part: Path, probe: Tensor) -> Tensor:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch needs it
    except ImportError as error:
        raise StructureError(f"{error.name} is not installed: install the extra `export`") from error
    written = torch.onnx.export(program, dynamo=True, verbose=False)
    assert written is not None
    written.save(part)
    session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: probe.numpy()})[0]
    return torch.from_numpy(found)
