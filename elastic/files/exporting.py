"""Write a network as a file that other programs run, and check it against the network before it is left."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic.errors import FileError, OptionError, StructureError
from elastic.files.formats import FORMATS, Format, Run, Source, list_tensors
from elastic.files.formats.interface import Outputs
from elastic.levels.cutting import extract_level

# Absolute, and relative to the largest value of an output; in 8 bits, what only a fault would exceed.
TOLERANCE, TOLERANCE_INT8 = 1e-5, 0.5


def export(
    net: nn.Module,
    example: Tensor,
    path: str | Path,
    about: Mapping[str, Any] | None = None,
    calibration: Sequence[Tensor] = (),
) -> float:
    """Write a network for other programs, in the format that the file's ending names; see `docs/export.md`.

    Its outputs may be a tensor or nested tuples, lists and dictionaries of tensors. `.pt2` gives them back as
    they are, other formats one after the other.

    Args:
        net: plain, e.g. compacted or a level; or with kernel activation modules, which then mask kernels.
        example: an input, batch first.
        about: what the file says of the network, in plain containers, where its format has a place for it.
        calibration: batches of inputs; with some the network is brought to 8 bits by the format's own tool.

    Returns:
        the largest difference of outputs, relative to the largest value where that is above 1.

    Raises:
        OptionError: a kind of file that is not known, or one that has no 8 bits.
        FileError: outputs that differ by more than 1e-5, in 8 bits by half of the largest; a missing package.
    """
    path = Path(path)
    form = find_format(path)
    if calibration and not form.has_int8:
        raise OptionError(f"{path.suffix} has no 8 bits: name a file that ends in {_list_endings(int8=True)}")
    form.require()
    source = Source(_prepare(net), example[:1], about or {}, calibration)
    tolerance = TOLERANCE_INT8 if calibration else TOLERANCE
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        form.write(source, part)
        remedy = "leave it in fp32" if calibration else "export it in fp32, or in another format"
        try:
            difference = _measure_difference(form.open(part, None), source)
        except RuntimeError as error:  # of the runtime, which does not take what its tools have made
            cause = str(error).splitlines()[0]
            raise FileError(f"{path} cannot be run by its runtime ({cause}): {remedy}") from error
        if not difference <= tolerance:  # nor is NaN
            raise FileError(f"{path} would differ from the network by {difference:.1e}: {remedy}")
        for file in sorted(part.parent.iterdir(), key=lambda file: file == part):  # the named one last
            os.replace(file, path.with_name(file.name))
    return difference


def open_exported(path: str | Path, threads: int | None = None) -> Run:
    """Open an exported file in its own runtime, to be called with inputs; it lists the outputs.

    Args:
        threads: that it may use; by default as many as the runtime likes.

    Raises:
        OptionError: a kind of file that is not known.
        FileError: the runtime is missing, or the file.
    """
    path = Path(path)
    form = find_format(path)
    form.require()
    if not path.is_file():
        raise FileError(f"there is no file {path}: export a network into it first")
    return form.open(path, threads)


def find_format(path: Path) -> Format:
    """Find the format that a file's ending names.

    Raises:
        OptionError: there is none.
    """
    if path.suffix not in FORMATS:
        raise OptionError(f"{path} cannot be written: name a file that ends in {_list_endings()}")
    return FORMATS[path.suffix]


def _list_endings(int8: bool = False) -> str:
    *first, last = [ending for ending, form in FORMATS.items() if form.has_int8 or not int8]
    return f"{', '.join(first)} or {last}"


def _prepare(net: nn.Module) -> nn.Module:
    """Copy a network as other programs take it: a level's tensors are parts of others, and have layouts."""
    net = extract_level(net).eval()
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = tensor.detach().contiguous()
    return net


@torch.no_grad()
def _measure_difference(run: Run, source: Source) -> float:
    """Measure how far a file's outputs are from the network's, on noise or on what it was calibrated with."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, *source.example.shape[1:], generator=generator)
    probe = source.calibration[0] if source.calibration else noise
    return _compare(run(probe), list_tensors(source.net(probe)))


def _compare(actual: Outputs, expected: Outputs) -> float:
    """Measure the largest difference of outputs, relative to the largest value where that is above 1."""
    if not expected or len(actual) != len(expected):
        raise StructureError(f"{len(actual)} of {len(expected)} outputs can be written: return tensors alone")
    pairs = zip(actual, expected, strict=True)
    return max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs)
