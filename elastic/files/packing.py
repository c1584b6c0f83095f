"""Write named tensors and what is to be said of them into one safetensors file, and read them back.

A file is a plain one, unless it is packed: then tensors that are mostly zero are stored as a bitmap and their
non-zeros, which only this module reads. The metadata has a digest of all.
"""

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from elastic.errors import FileError, OptionError, cite
from elastic.files.atomic import write_atomically

# What a file's bytes make of the library and of json: a header cut short, other types, other keys.
DAMAGE = (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError)
SPARSE = 0.75  # a tensor of fewer non-zeros than this is stored as a bitmap and its non-zeros
BITS, VALUES = ":bits", ":values"  # of a sparse tensor, behind its name
DIGEST, BLANK = "sha256", "0" * 64  # of the file, with this in its own place
KEY = "elastic"  # of the metadata: one key for all, since their order in the file would be random


def write_tensors(
    tensors: Mapping[str, Tensor], about: Mapping[str, Any], path: Path, packed: bool = False
) -> None:
    """Write tensors atomically.

    Args:
        about: plain containers.
        packed: leave out the zeros of sparse tensors.
    """
    check_about(about)
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if (storage := tensor.untyped_storage().data_ptr()) in storages:
            tensor = tensor.clone()  # layers share it: the library writes no tensor twice
        storages.add(storage)
        nonzero = tensor != 0
        if packed and tensor.is_floating_point() and nonzero.sum() < SPARSE * tensor.numel():
            shapes[name] = list(tensor.shape)
            stored[name + BITS], stored[name + VALUES] = _pack_bits(nonzero), tensor[nonzero]
        else:
            stored[name] = tensor
    meta = {DIGEST: BLANK, "about": dict(about), "sparse": shapes}
    content = save(stored, {KEY: json.dumps(meta)})  # the metadata comes first
    content = content.replace(BLANK.encode(), hashlib.sha256(content).hexdigest().encode(), 1)
    write_atomically(path, lambda part: part.write_bytes(content))


def check_about(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is to be said of a network, where a file can say it.

    Raises:
        OptionError: it has others than plain containers, texts and numbers.
    """
    for name, value in about.items():
        if not isinstance(name, str):
            raise OptionError(f"about says something by the name {name!r}: give it a name that is a text")
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            cause = f"a {type(value).__name__} as '{name}' ({cite(error)})"
            raise OptionError(f"about has {cause}: give plain lists and numbers") from error
    return about


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a file, and what is said of them; a file without a digest is read as it is.

    Raises:
        FileError: it is missing or damaged.
    """
    try:
        content = path.read_bytes()
        meta = _read_meta(content)
        stored = load(content)
        parts = {name + part for name in meta["sparse"] for part in (BITS, VALUES)}
        tensors = {name: tensor for name, tensor in stored.items() if name not in parts}
        for name, shape in meta["sparse"].items():
            tensors[name] = _unpack(stored[name + BITS], stored[name + VALUES], shape)
        return tensors, dict(meta["about"])
    except DAMAGE as error:
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
    except DAMAGE as error:
        raise _refuse(path, error) from error


def _refuse(path: Path, error: Exception) -> FileError:
    cause = cite(error)
    return FileError(f"{path} cannot be read ({cause}): train again or restore it")


def _read_meta(content: bytes) -> dict[str, Any]:
    """Read what is said of the tensors, after comparing the digest with the contents."""
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        head = json.loads(content[8:end])
    except ValueError as error:
        raise ValueError("it is no whole safetensors file") from error
    metadata = head.get("__metadata__", {})
    if KEY not in metadata:
        raise ValueError("its metadata says nothing of a network: `elastic.save` writes what can be loaded")
    meta: dict[str, Any] = json.loads(metadata[KEY])
    if meta.keys() - {DIGEST} != {"about", "sparse"}:
        raise ValueError(f"its metadata holds {', '.join(sorted(meta))}")
    if DIGEST in meta:
        blank = content.replace(str(meta[DIGEST]).encode(), BLANK.encode(), 1)
        if hashlib.sha256(blank).hexdigest() != meta[DIGEST]:
            raise ValueError("its digest is that of other contents")
    return meta


def _pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask into bytes, its first element into the lowest bit of the first one."""
    bits = mask.flatten().to(torch.uint8)
    bits_N8 = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits_N8 << torch.arange(8)).sum(1).to(torch.uint8)


def _unpack(bits: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    if not all(type(size) is int and size >= 0 for size in shape) or prod(shape) > 8 * len(bits):
        raise ValueError(f"{len(bits)} bytes of places for {shape}")
    nonzero = (bits[:, None] >> torch.arange(8) & 1).bool().flatten()
    if int(nonzero.sum()) != len(values):
        raise ValueError(f"{len(values)} values for {int(nonzero.sum())} places")
    tensor = torch.zeros(shape, dtype=values.dtype)
    tensor.view(-1)[nonzero[: tensor.numel()]] = values
    return tensor
