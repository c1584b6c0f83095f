"""Write a network as a file that other programs run, and check it against the network before it is left."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic.errors import ElasticError, FileError, OptionError, StructureError, cite
from elastic.files.atomic import check_place
from elastic.files.formats import FORMATS, Format, Run, Source
from elastic.files.formats.interface import Inputs, Outputs
from elastic.files.network import Network
from elastic.files.outputs import PlainOutputs, is_plain, make_plain_outputs, measure_difference
from elastic.files.packing import check_about
from elastic.levels.cutting import extract_level
from elastic.levels.nested import Levels
from elastic.widths.inputs import Example, count_batch, list_inputs, select_samples
from elastic.widths.leaves import list_tensors
from elastic.widths.mode import set_mode

# Absolute, and relative to the largest value of an output; in 8 bits, what only a fault would exceed.
TOLERANCE, TOLERANCE_INT8 = 1e-5, 0.5


def export(
    net: Network | Levels | nn.Module,
    example: Example,
    path: str | Path,
    about: Mapping[str, Any] | None = None,
    calibration: Sequence[Example] = (),
) -> float:
    """Write a network for other programs, in the format that the file's ending names; see `docs/export.md`.

    Its outputs may be a tensor or nested tuples, lists and dictionaries of tensors. `.pt2` gives them back as
    they are, other formats one after the other. Of other containers, such as dataclasses, the file has plain
    ones; what is no tensor is left out.

    Args:
        net: plain, e.g. compacted or a level; or with kernel activation modules, which then mask kernels; or
            what `elastic.load` returns, of which it is the largest level, with its modules.
        example: an input, batch first, or several. One that has not as many samples as the first is the same
            for all samples.
        about: what the file says of the network, in plain containers, where its format has a place for it.
        calibration: batches of inputs; with some the network is brought to 8 bits by the format's own tool.

    Returns:
        the largest difference of outputs, relative to the largest value where that is above 1.

    Raises:
        OptionError: a kind of file that is not known, or one that has no 8 bits; what no file can say.
        StructureError: the network does not run on the example, or cannot be traced.
        FileError: outputs that differ by more than 1e-5, in 8 bits by half of the largest; a missing package
            or folder.
    """
    path = Path(path).expanduser()
    form = find_format(path)
    if isinstance(calibration, Tensor):
        raise OptionError("calibration is one tensor: give a list of batches of inputs")
    if calibration and not form.has_int8:
        raise OptionError(f"{path.suffix} has no 8 bits: name a file that ends in {_list_endings(int8=True)}")
    form.require()
    check_place(path)
    if isinstance(net, Levels):
        net = net[-1]
    if isinstance(net, Network):
        about = net.about if about is None else about
        net = net.dynamic() if net.sets else net.plain()
    source = _make_source(net, example, about or {}, calibration)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        difference = _write_checked(form, source, part, path)
        for file in sorted(part.parent.iterdir(), key=lambda file: file == part):  # the named one last
            os.replace(file, path.with_name(file.name))
    return difference


def _make_source(
    net: nn.Module, example: Example, about: Mapping[str, Any], calibration: Sequence[Example]
) -> Source:
    """Bring a network, one sample and batches of inputs into the form that all formats are written from."""
    inputs = _list_inputs(example)
    sample, batch = select_samples(inputs, slice(1)), count_batch(inputs)
    return Source(
        _prepare(net, sample),
        sample,
        [x.dim() > 0 and len(x) == batch for x in inputs],
        check_about(about),
        [_list_inputs(batch) for batch in calibration],
    )


def _write_checked(form: Format, source: Source, part: Path, path: Path) -> float:
    """Write a file, and measure how far its outputs are from the network's.

    Raises:
        StructureError: it cannot be written.
        FileError: it cannot be run, or its outputs differ too much.
    """
    # The tools raise errors of whatever kind, also those of their own.
    try:
        form.write(source, part)
    except Exception as error:
        cause = f"{path} cannot be written ({cite(error)})"
        raise StructureError(f"{cause}: change forward there, or name another format") from error
    remedy = "leave it in fp32" if source.calibration else "export it in fp32, or in another format"
    try:
        difference = _compare_with_network(form.open(part, None), source)
    except ElasticError:
        raise
    except Exception as error:  # of the runtime, which does not take what its tools have made
        raise FileError(f"{path} cannot be run by its runtime ({cite(error)}): {remedy}") from error
    if not difference <= (TOLERANCE_INT8 if source.calibration else TOLERANCE):  # nor is NaN
        raise FileError(f"{path} would differ from the network by {difference:.1e}: {remedy}")
    return difference


def open_exported(path: str | Path, threads: int | None = None) -> Run:
    """Open an exported file in its own runtime, to be called with inputs; it lists the outputs.

    Args:
        threads: that it may use; by default as many as the runtime likes.

    Raises:
        OptionError: a kind of file that is not known.
        FileError: the runtime is missing, or the file.
    """
    path = Path(path).expanduser()
    form = find_format(path)
    form.require()
    if not path.is_file():
        raise FileError(f"there is no file {path}: export a network into it first")
    try:
        run = form.open(path, threads)
    except Exception as error:  # of whatever kind a runtime's are
        raise FileError(f"{path} cannot be opened ({cite(error)}): export it again") from error

    def run_or_explain(*inputs: Tensor) -> Outputs:
        tensors = [x.detach().cpu() for x in list_inputs(inputs)]
        try:
            return run(*tensors)
        except Exception as error:
            kinds = ", ".join(f"{tuple(x.shape)} of {x.dtype}" for x in tensors)
            cause = f"{path} does not run on {kinds} ({cite(error)})"
            raise StructureError(f"{cause}: give inputs as those that it was exported with") from error

    return run_or_explain


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


def _list_inputs(inputs: Example) -> Inputs:
    """List one input or several.

    Raises:
        StructureError: there is none, or an empty one, or none has a dimension.
    """
    tensors = tuple(x.detach().cpu() for x in list_inputs(inputs))
    if not all(x.numel() for x in tensors) or not any(x.dim() for x in tensors):
        raise StructureError("an example has no sample: give inputs, batch first")
    return tensors


def _prepare(net: nn.Module, sample: Inputs) -> nn.Module:
    """Copy a network as other programs take it: a level's tensors are parts of others, and have layouts."""
    net = set_mode(extract_level(net).cpu())
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = tensor.detach().contiguous()
    try:
        with torch.no_grad():
            outputs = net(*sample)
    except Exception as error:  # of whatever kind: it is the user's code
        shapes = ", ".join(str(tuple(x.shape)) for x in sample)
        raise StructureError(
            f"the network does not run on {shapes} ({cite(error)}): give one input, or several, batch first"
        ) from error
    net = net if is_plain(outputs) else PlainOutputs(net)
    if not list_tensors(make_plain_outputs(outputs)):
        raise StructureError("the network returns no tensor: nothing can be written")
    return net


@torch.no_grad()
def _compare_with_network(run: Run, source: Source) -> float:
    """Measure how far a file's outputs are from the network's, on noise or on what it was calibrated with."""
    generator = torch.Generator().manual_seed(0)
    probe = source.calibration[0] if source.calibration else source.repeat_example(3)
    if not source.calibration:
        probe = tuple(
            torch.randn(x.shape, generator=generator).to(x.dtype) if x.is_floating_point() else x
            for x in probe
        )
    return measure_difference(run(*probe), list_tensors(source.net(*probe)))
