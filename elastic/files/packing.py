"""Write named tensors and what is to be said of them into one safetensors file, and read them back.

A file is a plain one, unless it is packed: then tensors that are mostly zero are stored as a bitmap and their
non-zeros, which only this module reads.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from elastic.errors import FileError
from elastic.files.atomic import write_atomically

SPARSE = 0.75  # a tensor of fewer non-zeros than this is stored as a bitmap and its non-zeros
BITS, VALUES = ":bits", ":values"  # of a sparse tensor, behind its name: no tensor of a module has a colon
KEY = "elastic"  # of the metadata: one key for all, since their order in the file would be random


def write_tensors(
    tensors: Mapping[str, Tensor], about: Mapping[str, Any], path: Path, packed: bool = False
) -> None:
    """Write tensors atomically.

    Args:
        about: plain containers.
        packed: leave out the zeros of sparse tensors.
    """
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        nonzero = tensor != 0
        if packed and tensor.is_floating_point() and nonzero.sum() < SPARSE * tensor.numel():
            shapes[name] = list(tensor.shape)
            stored[name + BITS], stored[name + VALUES] = _pack_bits(nonzero), tensor[nonzero]
        else:
            stored[name] = tensor
    meta = {KEY: json.dumps({"about": dict(about), "sparse": shapes})}
    contents = save(stored, meta)  # `save_file` makes a file that nobody else may read
    write_atomically(path, lambda part: part.write_bytes(contents))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a file, and what is said of them.

    Raises:
        FileError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            meta = json.loads(file.metadata()[KEY])
        tensors = {name: tensor for name, tensor in stored.items() if ":" not in name}
        for name, shape in meta["sparse"].items():
            tensors[name] = _unpack(stored[name + BITS], stored[name + VALUES], shape)
        return tensors, meta["about"]
    # What the file's bytes make of the library and of json: a header cut short, other types, other keys.
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _refuse(path, error) from error


def read_about(path: Path) -> dict[str, Any]:
    """Read what is said of the tensors of a file, without them.

    Raises:
        FileError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()[KEY])["about"]
            return about
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _refuse(path, error) from error


def _refuse(path: Path, error: Exception) -> FileError:
    cause = str(error).splitlines()[0]
    return FileError(f"{path} cannot be read ({cause}): train again or restore it")


def _pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask into bytes, its first element into the lowest bit of the first one."""
    bits = mask.flatten().to(torch.uint8)
    bits_N8 = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits_N8 << torch.arange(8)).sum(1).to(torch.uint8)


def _unpack(bits: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    nonzero = (bits[:, None] >> torch.arange(8) & 1).bool().flatten()
    if int(nonzero.sum()) != len(values):
        raise ValueError(f"{len(values)} values for {int(nonzero.sum())} places")
    tensor = torch.zeros(shape, dtype=values.dtype)
    tensor.view(-1)[nonzero[: tensor.numel()]] = values
    return tensor
