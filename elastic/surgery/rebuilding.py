"""Saved weights and the shapes they need: a checkpoint holds tensors only, its shapes are the architecture.

Nothing is pickled but tensors and plain containers, so every file here loads with `weights_only=True`.
"""

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.surgery.depth import count_blocks, deepen
from elastic.surgery.reindexing import reindex, resize_index
from elastic.widths.discovery import Widths


def rebuild(model: nn.Module, widths: Widths, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Give the model the depth and the shapes of a state dict, in place; values are for `load_state_dict`.

    Raises:
        StructureError: the state is of another architecture; the model is as it was.
    """
    first = widths.sizes()
    held = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    shallow, depths = copy.deepcopy(widths), count_blocks(model)
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
    for stage, count in count_blocks(model).items():
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
