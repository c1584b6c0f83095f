"""Saved weights and the shapes they need: a checkpoint holds tensors only, its shapes are the architecture.

Nothing is pickled but tensors and plain containers, so every file here loads with `weights_only=True`.
"""

import copy
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from elastic.depth import deepen, depth
from elastic.errors import StructureError
from elastic.surgery import reindex, resize_index
from elastic.widths import Widths


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
