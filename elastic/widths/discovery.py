"""Find the widths of any CNN: its channel axes, from the model and an example input.

The model is traced with torch.fx on the meta device (no arithmetic, no memory), in training and in
evaluation mode; channel axes that meet are united (`elastic.widths.tracker`). What remains apart is
a `Width`: a number of channels that can change, with every tensor dimension that must follow.
"""

from collections.abc import Container, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx, nn

from elastic.errors import OptionError, StructureError
from elastic.widths.collecting import collect_widths
from elastic.widths.computed import fix_computed_sizes
from elastic.widths.hooks import quiet_hooks
from elastic.widths.inputs import count_batch, list_inputs
from elastic.widths.operations.interface import get_operation_name, is_stored
from elastic.widths.parameters import find_computation, try_constraints
from elastic.widths.sizing import find_spans, list_layouts
from elastic.widths.stock import Records
from elastic.widths.tracing import get_layer, make_meta_copy, trace_modes
from elastic.widths.tracing.gradients import find_untrained
from elastic.widths.tracker import AxisTracker
from elastic.widths.union import Axis, ChannelUnion
from elastic.widths.width import Segment, Slot, Width, Widths, fix_widths

__all__ = ["Segment", "Slot", "Width", "Widths", "discover", "find_widths"]


def discover(
    model: nn.Module,
    *example: Tensor,
    check: bool = False,
    only: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Widths:
    """Find the widths of a model.

    Args:
        model: any CNN that torch.fx can trace, or a part of one; it is not changed and not run.
        example: its inputs, batch first; only their shapes and types matter.
        check: change every width of a copy of the model, and run it: what makes it another function is fixed.
        only: layers that write the widths to find, by name or pattern (`layer4.*`); all others are fixed.
        exclude: layers that write widths which are not to change.

    Raises:
        StructureError: the model cannot be traced, or none of its channel axes can change.
        OptionError: a name or pattern is of no layer that writes a width.
    """
    widths = find_widths(model, *example)
    leave_out(widths, only, exclude)
    if check:
        from elastic.surgery.checking import fix_wrong_widths  # which stands on this module

        fix_wrong_widths(model, widths)
    return refuse_none(widths)


def leave_out(widths: Widths, only: Sequence[str] | None, exclude: Sequence[str]) -> None:
    """Fix widths that are not to change, in place; they are meant by any of the layers that write them."""
    writers = {n: {n, *(slot.module for slot in w.slots_with("out"))} for n, w in widths.items()}
    for pattern in (*(only or ()), *exclude):
        names = {name for group in writers.values() for name in group} | set(widths.fixed)
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptionError(
                f"'{pattern}' is of no layer that writes a width: choose of {', '.join(widths)}"
            )
    reasons = {n: "it is excluded" for n, names in writers.items() if _match(names, exclude)}
    if only is not None:
        reasons |= {n: "it is not among those asked for" for n in widths if not _match(writers[n], only)}
    fix_widths(widths, reasons)


def _match(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def refuse_none(widths: Widths) -> Widths:
    """Raise StructureError where no width can change, with the reasons."""
    if not widths:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in widths.fixed.items())
        raise StructureError(
            f"no width of this model can change ({reasons or 'it has no layer with channels'})"
        )
    return widths


def find_widths(model: nn.Module, *example: Tensor) -> Widths:
    """Find the widths of a model that may have none left, see `discover`."""
    try_constraints(model)
    replica = make_meta_copy(model)
    inputs = _make_inputs(list_inputs(example))
    with quiet_hooks(model):
        graphs = trace_modes(replica, *inputs)
        elements, records, trackers = _track(graphs, replica, inputs)
        _fix_kept([axis for tracker in trackers for axis in tracker.list_kept()], elements, records)
        _fix_indivisible([divided for tracker in trackers for divided in tracker.divided], elements)
        fix_computed_sizes(graphs, replica, elements, records)
    widths = collect_widths(elements, records)
    widths.example = tuple(inputs)
    widths.written = frozenset(path for tracker in trackers for path in tracker.written)
    widths.computed = frozenset(path for tracker in trackers for path in tracker.computed)
    widths.untrained = find_untrained(graphs[0], partial(get_layer, replica))
    fix_widths(widths, _find_unstored(model, widths, _list_unread(graphs)))
    fix_widths(widths, _find_inseparable(widths))
    return widths


def _track(
    graphs: Sequence[fx.Graph],
    replica: nn.Module,
    inputs: Sequence[Tensor],
    kept_groups: frozenset[fx.Node] = frozenset(),
) -> tuple[ChannelUnion, Records, list[AxisTracker]]:
    """Carry channels through a model's graphs: again where of a norm's groups but one would be left.

    Args:
        kept_groups: the operations whose groups keep their number.
    """
    elements, records = ChannelUnion(), Records()
    trackers = [AxisTracker(graph, replica, elements, records, kept_groups) for graph in graphs]
    for tracker in trackers:
        with torch.no_grad():
            tracker.run(*inputs)
    joined = {node: axis for tracker in trackers for node, axis in tracker.joined.items()}
    single = {node for node, axis in joined.items() if len(np.unique(elements.represent(axis))) == 1}
    if single:
        return _track(graphs, replica, inputs, kept_groups | single)
    return elements, records, trackers


def _fix_kept(axes: Sequence[Axis], elements: ChannelUnion, records: Records) -> None:
    """Fix what a forward keeps for the program and no layer reads, such as auxiliary outputs; in place."""
    if not axes:
        return
    read = [elements.represent(axis) for role, axis in records.values() if role == "in"]
    for axis in axes:
        if not any(np.isin(elements.represent(axis), own).any() for own in read):
            elements.fix(axis, "the forward keeps it, and no layer reads it")


def _fix_indivisible(divided: Iterable[tuple[Axis, int, str]], elements: ChannelUnion) -> None:
    """Fix axes that have to be multiples of a number, but where channels come so many at once; in place."""
    for axis, divisor, reason in divided:
        _, repeats = np.unique(elements.represent(axis), return_counts=True)
        if (repeats % divisor).any():
            elements.fix(axis, reason)


def _make_inputs(example: Sequence[Tensor]) -> list[Tensor]:
    """Make inputs without data, of the example's shapes.

    Of a batch of one, two samples: batch norm in training mode has something to average then. Inputs beside a
    larger batch keep their length, say that of a number for all samples.
    """
    batch = count_batch(example)
    shapes = [(2, *x.shape[1:]) if x.dim() and len(x) == batch < 2 else x.shape for x in example]
    return [x.new_empty(shape, device="meta") for x, shape in zip(example, shapes, strict=True)]


def _list_unread(graphs: Iterable[fx.Graph]) -> set[tuple[str, str]]:
    """List the tensors of which the forward asks no more than a shape, as of a state that it begins anew."""
    fetched = [node for graph in graphs for node in graph.find_nodes(op="get_attr")]
    read = {node.target for node in fetched if not all(map(_asks_shape, node.users))}
    places = {str(node.target).rpartition(".")[::2] for node in fetched if node.target not in read}
    called = {node.target for graph in graphs for node in graph.find_nodes(op="call_module")}
    return {(module, tensor) for module, tensor in places if module not in called}


def _asks_shape(node: fx.Node) -> bool:
    """Tell whether an operation asks of a tensor what it could ask of one without data."""
    asks = node.target is getattr and node.args[1] in ("shape", "device", "dtype", "ndim")
    return asks or get_operation_name(node) in ("size", "dim", "zeros_like", "ones_like")


def _find_unstored(model: nn.Module, widths: Widths, unread: Container[tuple[str, str]]) -> dict[str, str]:
    """Find widths with tensors that no checkpoint has, and whose entries are not alike, with reasons."""
    unstored: dict[tuple[str, str], Tensor] = {}
    for path, module in model.named_modules():
        others = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        for name, value in (*vars(module).items(), *others.items()):
            if (
                isinstance(value, Tensor)
                and not find_computation(module, name)
                and (path, name) not in unread
            ):
                unstored[path, name] = value
    reasons: dict[str, str] = {}
    for slot, name in ((s, n) for n in (widths if unstored else ()) for s in widths[n].slots):
        value = unstored.get((slot.module, slot.tensor))
        if value is not None and (value.is_meta or not (value == value.narrow(slot.dim, 0, 1)).all()):
            tensor = f"{slot.module}.{slot.tensor}".lstrip(".")
            reasons[name] = f"{tensor} is in no checkpoint: make it a buffer that is stored"
    return reasons


def _find_inseparable(widths: Widths) -> dict[str, str]:
    """Find widths that have to be fixed so that saved tensors tell the sizes of all others, with reasons.

    Where channels of two widths lie side by side on every tensor, only an attribute knows how many are whose.
    """
    unknown = [name for name in widths if not _is_told(widths, name, widths)]
    while remaining := [name for name in unknown if not _is_told(widths, name, unknown)]:
        if len(remaining) == len(unknown):
            break
        unknown = remaining
    reasons: dict[str, str] = {}
    while remaining and (spans := find_spans(remaining, list_layouts(widths, remaining))):
        name = next(name for name in remaining if name in spans)
        others = " and ".join(other for other in spans if other != name)
        reasons[name] = f"no tensor tells its channels from those of {others}"
        remaining.remove(name)
    return reasons


def _is_told(widths: Widths, name: str, unknown: Container[str]) -> bool:
    """Tell whether a tensor of a width has no channels beside its own but of widths that are known."""
    return any(
        is_stored(slot.tensor)
        and all(s.width is None or s.width == name or s.width not in unknown for s in slot.layout)
        for slot in widths[name].slots
    )
