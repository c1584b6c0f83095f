"""Saved weights and the shapes they need: a checkpoint holds tensors only, its shapes are the architecture.

Nothing is pickled but tensors and plain containers, so every file here loads with `weights_only=True`.
"""

import copy
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from elastic.depth import deepen, depth
from elastic.errors import StructureError
from elastic.surgery import reindex, resize_index
from elastic.widths import Widths, discover

SPARSE = 0.75  # a tensor of fewer non-zeros than this is stored as a bitmap and its non-zeros


def rebuild(model: nn.Module, widths: Widths, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Give the model the depth and the shapes of a state dict, in place; values are for `load_state_dict`.

    Raises:
        StructureError: the state is of another architecture; the model is as it was.
    """
    first = widths.sizes()
    held = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    shallow, depths = copy.deepcopy(widths), depth(model)
    try:
        add_blocks(model, widths, state, prefix)
        _resize(model, widths, {name: _size(state, widths, name, prefix) for name in widths})
        _check(model, state, prefix)
    except StructureError:
        for stage, count in depths.items():
            del model.get_submodule(stage)[count:]  # type: ignore[operator]
        for name in first:
            shallow[name].size = widths[name].size
        widths.widths, widths.fixed = shallow.widths, shallow.fixed
        _resize(model, widths, first)
        for tensor, value in held:
            tensor.data = value
        raise


def add_blocks(model: nn.Module, widths: Widths, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Append to every stage the blocks that a state dict has beyond the model's."""
    for stage, count in depth(model).items():
        head = f"{prefix}{stage}." if stage else prefix
        blocks = {name.removeprefix(head).partition(".")[0] for name in state if name.startswith(head)}
        for _ in range(count, 1 + max((int(block) for block in blocks if block.isdigit()), default=-1)):
            deepen(model, widths, stage)


def _resize(model: nn.Module, widths: Widths, sizes: Mapping[str, int]) -> None:
    changed = {name: size for name, size in sizes.items() if size != widths[name].size}
    reindex(model, widths, {name: resize_index(widths[name].size, size) for name, size in changed.items()})


def _check(model: nn.Module, state: Mapping[str, Tensor], prefix: str) -> None:
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
        if all(segment.width == name for segment in slot.layout):
            for tensor in (slot.tensor, f"parametrizations.{slot.tensor}.original"):
                held = state.get(f"{prefix}{slot.module}.{tensor}")
                if held is not None and held.dim() > slot.dim:
                    return max(1, held.shape[slot.dim] // sum(s.repeat for s in slot.layout))
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
    replace_file(path, lambda part: save_file(tensors, part, meta))


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's own, but written beside its place: a temporary file elsewhere may be copied half-way."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # torch.save hides what goes wrong with a file
        torch.save(checkpoint, buffer)
        replace_file(Path(path), lambda part: part.write_bytes(buffer.getbuffer()))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and put it there at once: a failure leaves what was there."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_compact(net: nn.Module, path: Path, example: Tensor) -> nn.Module:
    """Put the tensors of `save_compact` into the network they were compacted from, as first built.

    Raises:
        StructureError: the file is missing or damaged, or of another architecture.
    """
    try:
        state = _unpacked(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        raise StructureError(f"{path} cannot be read ({cause}): train again or restore it") from error
    add_blocks(net, discover(net, example), state)
    layers = dict(net.named_modules())
    for name in state.keys() - net.state_dict().keys():  # compaction may have given a layer a bias
        layer, _, tensor_name = name.rpartition(".")
        if tensor_name == "bias" and getattr(layers.get(layer), "bias", 0) is None:
            layers[layer].bias = nn.Parameter(torch.zeros_like(state[name]))
    rebuild(net, discover(net, example), state)
    net.load_state_dict(state)
    return net.eval()


def _unpacked(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shapes = json.loads(file.metadata()["elastic"])["sparse"]
    state = {name: tensor for name, tensor in held.items() if ":" not in name}
    for name, shape in shapes.items():
        kept = (held[f"{name}:bits"][:, None] >> torch.arange(8) & 1).bool().flatten()
        values = held[f"{name}:values"]
        if int(kept.sum()) != len(values):
            raise ValueError(f"'{name}' has {len(values)} values for {int(kept.sum())} places")
        tensor = torch.zeros(shape, dtype=values.dtype)
        tensor.view(-1)[kept[: tensor.numel()]] = values
        state[name] = tensor
    return state
