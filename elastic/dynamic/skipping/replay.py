"""Sequences of layers that the kernel carries out, played as one call instead of one call a layer."""

import operator
import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.modules import iterate_modules
from elastic.dynamic.skipping.active import Active
from elastic.dynamic.skipping.native import Tape

MOST_SAMPLES = 8  # with more of them, what Python costs is nothing beside the work
MOST_TAPES = 8  # of a sequence, in each thread

Value = Tensor | Active


class Replayed(nn.Module):
    """Layers of which each is a call of the kernel; the calls are recorded for each shape and thread.

    Args:
        layers: from values to a tuple of values.
    """

    def __init__(self, layers: fx.GraphModule) -> None:
        super().__init__()
        self.layers, self.switches = layers, list(iterate_modules(layers))

    def forward(self, *inputs: Value) -> tuple[Value, ...]:
        tensors, like = _flat(inputs)
        if len(tensors[0]) > MOST_SAMPLES:
            return self.layers(*inputs)  # type: ignore[no-any-return]
        like_x = ((x.shape, x.dtype, x.device) for x in tensors)
        key = (torch.get_num_threads(), *(m.active_set for m in self.switches), *like_x)
        tapes = _own.tapes.setdefault(self, {})
        if key not in tapes:
            if len(tapes) == MOST_TAPES:
                tapes.clear()
            tapes[key] = self._record(tensors, like)
        tape, leaves = tapes[key]
        if not tape.plays:
            return self.layers(*inputs)  # type: ignore[no-any-return]
        return _like(tape.play(tensors), leaves)

    def _record(self, tensors: list[Tensor], like: list[bool]) -> tuple[Tape, list[bool]]:
        leaves: list[bool] = []

        def layers(held: list[Tensor]) -> list[Tensor]:
            results, is_list = _flat(self.layers(*_like(held, like)))
            leaves.extend(is_list)
            return results

        return Tape(tensors, layers), leaves


class _Own(threading.local):
    def __init__(self) -> None:
        self.tapes: WeakKeyDictionary[Replayed, dict[tuple[object, ...], tuple[Tape, list[bool]]]] = (
            WeakKeyDictionary()
        )


_own = _Own()


def _flat(values: tuple[Value, ...]) -> tuple[list[Tensor], list[bool]]:
    """The tensors of values, and of each value whether it is a list of active channels."""
    is_list = [isinstance(value, Active) for value in values]
    return [x for value in values for x in (value if isinstance(value, Active) else (value,))], is_list


def _like(tensors: list[Tensor], is_list: list[bool]) -> tuple[Value, ...]:
    each = iter(tensors)
    return tuple(Active(next(each), next(each), next(each)) if a_list else next(each) for a_list in is_list)


def fuse(traced: fx.GraphModule, called: Callable[[fx.Node], bool]) -> None:
    """Put each sequence of two or more nodes that are calls of the kernel into one `Replayed`, in place."""
    sequences: list[list[fx.Node]] = [[]]
    for node in traced.graph.nodes:
        if called(node):
            sequences[-1].append(node)
        elif node.op.startswith("call") and sequences[-1]:
            sequences.append([])
    for i, nodes in enumerate(nodes for nodes in sequences if len(nodes) > 1):
        _fuse(traced, nodes, f"replayed{i}")
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()


def _fuse(traced: fx.GraphModule, nodes: list[fx.Node], name: str) -> None:
    inputs = list(dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in nodes))
    outputs = [node for node in nodes if any(user not in nodes for user in node.users)]
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    traced.add_submodule(name, Replayed(fx.GraphModule(traced, graph)))
    with traced.graph.inserting_after(nodes[-1]):
        call = traced.graph.call_module(name, tuple(inputs))
    for i, node in enumerate(outputs):
        with traced.graph.inserting_after(call):
            item = traced.graph.call_function(operator.getitem, (call, i))
        node.replace_all_uses_with(item)
    for node in reversed(nodes):
        traced.graph.erase_node(node)
