"""Give a model the shapes of saved weights: a checkpoint holds tensors only, its shapes are the architecture.

Nothing is pickled but tensors and plain containers, so every file here loads with `weights_only=True`.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.surgery.depth import count_blocks, deepen, find_stages, keep_blocks, name_next
from elastic.surgery.graphs import release_graphs
from elastic.surgery.layers import list_depthwise
from elastic.surgery.reindexing import reindex, resize_index
from elastic.widths.copying import copy_module
from elastic.widths.discovery import find_widths
from elastic.widths.sizing import solve_sizes
from elastic.widths.width import Slot, Widths

REFUSAL = "the checkpoint is of another architecture"
GATES = "; give both or neither their gates or other parametrizations, or save what `compact` returns"


def rebuild(model: nn.Module, widths: Widths, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Give the model the depth and the shapes of a state dict, in place; values are for `load_state_dict`.

    Raises:
        StructureError: the state is of another architecture; the model is as it was.
    """
    values = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    before, blocks = copy.deepcopy(widths), count_blocks(model)
    release_graphs(model.parameters())  # which have nothing to say of the values to come
    try:
        add_blocks(model, widths, state, prefix)
        depthwise = list_depthwise(model)
        _resize(model, widths, _read_sizes(state, widths, prefix))
        if list_depthwise(model) != depthwise and _find_misfit(model, state, prefix):
            _rebuild_groups(model, widths, state, prefix)
        if misfit := _find_misfit(model, state, prefix):
            raise StructureError(f"{REFUSAL}: {misfit}")
    except StructureError:
        for stage, count in blocks.items():
            keep_blocks(model, stage, count)
        sizes = before.sizes()
        for name, width in before.items():
            width.size = widths[name].size
        widths.widths, widths.fixed = before.widths, before.fixed
        _resize(model, widths, sizes)
        for tensor, value in values:
            tensor.data = value
        raise


def add_blocks(model: nn.Module, widths: Widths, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Append to every stage the blocks that a state dict has beyond the model's."""
    for stage in find_stages(model):
        head = f"{prefix}{stage}." if stage else prefix
        children = {name.removeprefix(head).partition(".")[0] for name in state if name.startswith(head)}
        while name_next(model.get_submodule(stage)) in children:
            deepen(model, widths, stage)


def _resize(model: nn.Module, widths: Widths, sizes: Mapping[str, int]) -> None:
    changes = {name: size for name, size in sizes.items() if size != widths[name].size}
    reindex(model, widths, {name: resize_index(widths[name].size, size) for name, size in changes.items()})


def _rebuild_groups(model: nn.Module, widths: Widths, state: Mapping[str, Tensor], prefix: str) -> None:
    """Go on by the widths that there are once groups of one channel can go one by one, as in `compact`."""
    for net in (copy_module(model), model):  # where it fails, the model is still as its widths say
        regrouped = find_widths(net, *widths.example)
        rebuild(net, regrouped, state, prefix)
    widths.widths, widths.fixed = regrouped.widths, regrouped.fixed


def _find_misfit(model: nn.Module, state: Mapping[str, Tensor], prefix: str) -> str | None:
    """Tell which tensor of the model a state lacks or has in another shape, or what it has beyond them."""
    # What modules keep beside tensors is theirs to take up.
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    shapes = {prefix + name: tensor.shape for name, tensor in tensors.items()}
    names = {name for name, value in state.items() if name.startswith(prefix) and isinstance(value, Tensor)}
    for name in sorted(shapes.keys() ^ names):
        remedy = GATES if ".parametrizations." in name else ""
        return f"it {'lacks' if name in shapes else 'also holds'} '{name}'{remedy}"
    for name, shape in shapes.items():
        if state[name].shape != shape:
            return f"'{name}' is {tuple(state[name].shape)}, the model's is {tuple(shape)}"
    return None


def _read_sizes(state: Mapping[str, Tensor], widths: Widths, prefix: str) -> dict[str, int]:
    """Read the channels that each width has in a state dict off its tensors.

    A dimension has as many positions as its widths take together: those of one width say its size, and then
    those where only one more is unknown.
    """
    slots = dict.fromkeys(slot for width in widths.values() for slot in width.slots)
    tensors = {slot: _find_tensor(state, slot, prefix) for slot in slots}
    extents = {slot: value.shape[slot.dim] for slot, value in tensors.items() if value is not None}
    sizes: dict[str, int] = {}
    while len(sizes) < len(widths):
        read = [pair for slot, extent in extents.items() for pair in _solve(slot, extent, sizes)]
        if not read:
            unknown = [name for name in widths if name not in sizes]
            beside = {s.layout: n for s, n in extents.items() if any(g.width in unknown for g in s.layout)}
            solution = solve_sizes(unknown, beside, sizes)
            if not solution:
                raise StructureError(f"{REFUSAL}: it lacks width '{unknown[0]}'")
            return sizes | solution
        sizes |= dict(reversed(read))  # the first one counts, should they differ
    return sizes


def _solve(slot: Slot, extent: int, sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Solve for the one width of a slot whose size is not known yet."""
    repeats: Counter[str] = Counter()
    for segment in slot.layout:
        if segment.width is None:
            extent -= segment.repeat
        elif segment.width in sizes:
            extent -= segment.repeat * sizes[segment.width]
        else:
            repeats[segment.width] += segment.repeat
    if len(repeats) == 1:
        ((name, repeat),) = repeats.items()
        yield name, max(1, extent // repeat)


def _find_tensor(state: Mapping[str, Tensor], slot: Slot, prefix: str) -> Tensor | None:
    """Find a slot's tensor in a state dict, or what stands for it; None where none has that dimension."""
    chain = f"parametrizations.{slot.tensor}.original"
    # Of spectral norm by a hook, and of weight norm in either way.
    names = (slot.tensor, chain, f"{slot.tensor}_orig", f"{chain}1", f"{slot.tensor}_v")
    values = (state.get(f"{prefix}{slot.module}.{name}") for name in names)
    return next((value for value in values if value is not None and value.dim() > slot.dim), None)
