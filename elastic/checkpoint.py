"""Saved weights and the shapes they need: a checkpoint holds tensors only, its shapes are the architecture.

Nothing is pickled but tensors and plain containers, so every file here loads with `weights_only=True`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.surgery import reindex, resize_index
from elastic.widths import Widths, discover

SPARSE = 0.75  # a tensor of fewer non-zeros than this is stored as a bitmap and its non-zeros


def rebuild(model: nn.Module, widths: Widths, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Give the model the shapes of a state dict, in place; the values are for `load_state_dict`.

    Raises:
        StructureError: the state is of another architecture; the model is as it was.
    """
    sizes = {name: _size(state, widths, name, prefix) for name in widths}
    if changed := {n: size for n, size in sizes.items() if size != widths[n].size}:
        reindex(model, widths, {n: resize_index(widths[n].size, size) for n, size in changed.items()})
    own = {prefix + name: tensor.shape for name, tensor in model.state_dict().items()}
    theirs = {name for name in state if name.startswith(prefix)}
    for name in sorted(own.keys() ^ theirs):
        side = "lacks" if name in own else "also holds"
        raise StructureError(f"the checkpoint is of another architecture: it {side} '{name}'")
    for name, shape in own.items():
        if state[name].shape != shape:
            raise StructureError(
                f"the checkpoint is of another architecture: '{name}' is {tuple(state[name].shape)}, "
                f"the model's is {tuple(shape)}"
            )


def _size(state: Mapping[str, Tensor], widths: Widths, name: str, prefix: str) -> int:
    """The channels that a width has in a state dict, read off one of its tensors."""
    for slot in widths[name].slots:
        if len(slot.layout) == 1:
            for tensor in (slot.tensor, f"parametrizations.{slot.tensor}.original"):
                held = state.get(f"{prefix}{slot.module}.{tensor}")
                if held is not None and held.dim() > slot.dim:
                    return max(1, held.shape[slot.dim] // slot.layout[0].repeat)
    raise StructureError(f"the checkpoint is of another architecture: it lacks width '{name}'")


def save_compact(net: nn.Module, path: Path, about: Mapping[str, Any]) -> None:
    """Write a compacted network's tensors, the sparse ones without their zeros, atomically."""
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in net.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        kept = tensor != 0
        if tensor.is_floating_point() and kept.sum() < SPARSE * tensor.numel():
            shapes[name] = list(tensor.shape)
            bits = kept.flatten().to(torch.uint8)
            bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
            tensors[f"{name}:bits"] = (bits << torch.arange(8)).sum(1).to(torch.uint8)
            tensors[f"{name}:values"] = tensor[kept]
        else:
            tensors[name] = tensor
    meta = {"elastic": json.dumps({"about": dict(about), "sparse": shapes})}  # one key: their order is random
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, meta)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_compact(net: nn.Module, path: Path, example: Tensor) -> nn.Module:
    """Put the tensors of `save_compact` into the network they were compacted from, as first built.

    Raises:
        StructureError: the file is missing or damaged, or of another architecture.
    """
    try:
        with safe_open(path, framework="pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shapes = json.loads(file.metadata()["elastic"])["sparse"]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise StructureError(f"{path} cannot be read ({error}): train again or restore it") from error
    state = {name: tensor for name, tensor in held.items() if ":" not in name}
    for name, shape in shapes.items():
        kept = (held[f"{name}:bits"][:, None] >> torch.arange(8) & 1).bool().flatten()
        tensor = torch.zeros(shape)
        tensor.view(-1)[kept[: tensor.numel()]] = held[f"{name}:values"]
        state[name] = tensor
    for name in state.keys() - net.state_dict().keys():  # compaction may have given a layer a bias
        path_, _, tensor_name = name.rpartition(".")
        if tensor_name == "bias":
            net.get_submodule(path_).bias = nn.Parameter(torch.zeros_like(state[name]))
    rebuild(net, discover(net, example), state)
    net.load_state_dict(state)
    return net.eval()
