"""Play sequences of layers that the kernel carries out as one call, instead of one call a layer."""

import math
import operator
import threading
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.modules import iterate_modules
from elastic.dynamic.skipping.active import Active
from elastic.dynamic.skipping.inference import cut_out, delete_unused_layers
from elastic.dynamic.skipping.native import Tape

MAX_SAMPLES = 8  # at once: what Python costs is little beside their work, and their maps stay in the cache
MAX_TAPES = 8  # of a sequence, in each thread

Value = Tensor | Active
Recorded = tuple[Tape, list[bool]]  # and of each result whether it is a list of active channels


class Replayed(nn.Module):
    """Carry out layers of which each is a call of the kernel; calls are recorded for each shape and thread.

    Args:
        layers: from values to a tuple of values.
    """

    def __init__(self, layers: fx.GraphModule) -> None:
        super().__init__()
        self.layers, self.modules_inside = layers, list(iterate_modules(layers))

    def forward(self, *inputs: Value) -> tuple[Value, ...]:
        tensors, is_list = _flatten(inputs)
        if len(tensors[0]) > MAX_SAMPLES and _have_samples(inputs):
            count = math.ceil(len(tensors[0]) / MAX_SAMPLES)
            parts = zip(*(x.tensor_split(count) for x in tensors), strict=True)
            results, lists = zip(*(self._play(list(part), is_list) for part in parts), strict=True)
            return _unflatten([torch.cat(values) for values in zip(*results, strict=True)], lists[0])
        return _unflatten(*self._play(tensors, is_list))

    def _play(self, tensors: list[Tensor], is_list: list[bool]) -> tuple[list[Tensor], list[bool]]:
        shapes = ((x.shape, x.dtype, x.device) for x in tensors)
        key = (torch.get_num_threads(), *(module.active_set for module in self.modules_inside), *shapes)
        tapes = _thread.tapes.setdefault(self, {})
        if key not in tapes:
            if len(tapes) == MAX_TAPES:
                tapes.clear()
            tapes[key] = self._record(tensors, is_list)
        tape, results_are_lists = tapes[key]
        if tape.playable:
            return tape.play(tensors), results_are_lists
        return _flatten(self._run(_unflatten(tensors, is_list)))

    def _run(self, inputs: Sequence[Value]) -> tuple[Value, ...]:
        values: tuple[Value, ...] = self.layers(*inputs)
        return values

    def _record(self, tensors: list[Tensor], is_list: list[bool]) -> Recorded:
        results_are_lists: list[bool] = []

        def run_layers(copies: list[Tensor]) -> list[Tensor]:
            results, lists = _flatten(self._run(_unflatten(copies, is_list)))
            results_are_lists.extend(lists)
            return results

        return Tape(tensors, run_layers), results_are_lists


class _Thread(threading.local):
    """Hold the tapes of a thread."""

    def __init__(self) -> None:
        self.tapes: WeakKeyDictionary[Replayed, dict[tuple[object, ...], Recorded]] = WeakKeyDictionary()


_thread = _Thread()


def _flatten(values: Sequence[Value]) -> tuple[list[Tensor], list[bool]]:
    """Give the tensors of values, and of each value whether it is a list of active channels."""
    is_list = [isinstance(value, Active) for value in values]
    return [x for value in values for x in (value if isinstance(value, Active) else (value,))], is_list


def _have_samples(values: Sequence[Value]) -> bool:
    """Tell whether all values have an entry for each of the same samples; a map for all of them has none."""
    batches = {len(value.count_B if isinstance(value, Active) else value) for value in values}
    return len(batches) == 1 and all(isinstance(value, Active) or value.dim() == 4 for value in values)


def _unflatten(tensors: list[Tensor], is_list: list[bool]) -> tuple[Value, ...]:
    remaining = iter(tensors)
    return tuple(
        Active(next(remaining), next(remaining), next(remaining)) if is_active else next(remaining)
        for is_active in is_list
    )


def fuse(traced: fx.GraphModule, is_call: Callable[[fx.Node], bool]) -> None:
    """Put each sequence of two or more nodes that are calls of the kernel into one `Replayed`, in place."""
    sequences: list[list[fx.Node]] = [[]]
    for node in traced.graph.nodes:
        if is_call(node):
            sequences[-1].append(node)
        elif node.op.startswith("call") and sequences[-1]:
            sequences.append([])
    for i, nodes in enumerate(nodes for nodes in sequences if len(nodes) > 1):
        _fuse(traced, nodes, f"replayed{i}")
    delete_unused_layers(traced)
    traced.graph.lint()
    traced.recompile()


def _fuse(traced: fx.GraphModule, nodes: list[fx.Node], name: str) -> None:
    inputs = list(dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in nodes))
    outputs = [node for node in nodes if any(user not in nodes for user in node.users)]
    traced.add_submodule(name, Replayed(cut_out(traced, nodes, inputs, tuple(outputs))))
    with traced.graph.inserting_after(nodes[-1]):
        call = traced.graph.call_module(name, tuple(inputs))
    for i, node in enumerate(outputs):
        with traced.graph.inserting_after(call):
            item = traced.graph.call_function(operator.getitem, (call, i))
        node.replace_all_uses_with(item)
    for node in reversed(nodes):
        traced.graph.erase_node(node)
