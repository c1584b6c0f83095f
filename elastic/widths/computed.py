"""Find attributes that a forward computes with where they cannot tell: in C, or beside a float.

Of `1.0 / self.width`, `math.log2(self.width)` or `torch.ones(self.width)` a trace shows the result alone. So
such a forward is traced again with other numbers in its modules: what the two graphs hold other than these
has to be the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from elastic.errors import StructureError
from elastic.widths.operations.interface import ATTRIBUTE, get_operation_name
from elastic.widths.stock import Records, list_own_axes
from elastic.widths.tracing.constants import CONSTANT
from elastic.widths.tracing.sizes import AttributePlace, SizeAttribute
from elastic.widths.union import Axis, ChannelUnion

# Primes, so that no divisor stays; far from the numbers that they stand for, so that logarithms differ, and
# small, since a forward may make a tensor or a loop of them; not all one, so that ratios differ.
FEW, MANY = (3, 5), (61, 67, 71, 73)
MODERATE = 16
Call = tuple[Any, ...]


def fix_computed_sizes(
    graphs: Sequence[fx.Graph], model: nn.Module, elements: ChannelUnion, records: Records
) -> None:
    """Fix the channels that attributes count with which a model's forward computes, in any of its modes."""
    noted = {place for graph in graphs for place in graph.computed_sizes}  # type: ignore[attr-defined]
    read = {place for graph in graphs for place in graph.read_sizes} - noted  # type: ignore[attr-defined]
    counted = {place: _list_counted(model, place, records) for place in sorted(read | noted)}
    fixed = elements.fixed.numbers if any(counted.values()) else np.empty(0, np.int64)
    places = [
        place
        for place, axes in counted.items()
        if place in read and any((fixed[elements.represent(axis)] < 0).any() for axis in axes)
    ]
    sizes = {place: _choose_size(model, place, number) for number, place in enumerate(places)}
    for graph in graphs if places else ():
        noted.update(_Repeats(graph, sizes).find_used(places))
    for place in sorted(noted):
        elements.fix_all(counted[place], f"the forward computes with {place}")


def _list_counted(model: nn.Module, place: AttributePlace, records: Records) -> list[Axis]:
    """List the axes that an attribute follows, or that are counted by it on the layer itself."""
    key = (place.module, ATTRIBUTE + place.name, place.number)
    own = list_own_axes(model.get_submodule(place.module), place, records)
    return [records[key][1], *own] if key in records else own


def _choose_size(model: nn.Module, place: AttributePlace, number: int) -> int:
    value = vars(model.get_submodule(place.module))[place.name]
    size = value if isinstance(value, int) else value[place.number]
    sizes = MANY if size < MODERATE else FEW
    return sizes[number % len(sizes)]


class _Repeats:
    """Repeat the trace of a graph with other sizes, and compare what it calls."""

    def __init__(self, graph: fx.Graph, sizes: Mapping[AttributePlace, int]) -> None:
        self._trace: Callable[..., Any] = graph.trace_again  # type: ignore[attr-defined]
        self._sizes = sizes
        self._first = list(_list_calls(graph))

    def find_used(self, places: Sequence[AttributePlace]) -> list[AttributePlace]:
        """Find those of some attributes on whose values the graph depends."""
        if not places or not self._differs(places):
            return []
        if len(places) == 1:
            return [*places]
        half = len(places) // 2
        used = [place for part in (places[:half], places[half:]) for place in self.find_used(part)]
        return used or [*places]

    def _differs(self, places: Sequence[AttributePlace]) -> bool:
        calls = self._repeat({place: self._sizes[place] for place in places})
        if _is_same(self._first, calls):
            return False
        # The first trace may have left something behind, or may have drawn numbers.
        return self._repeated is not None and not _is_same(self._repeated, calls)

    @cached_property
    def _repeated(self) -> list[Call] | None:
        """Repeat the trace as it was; None where no two traces are the same."""
        calls, again = self._repeat({}), self._repeat({})
        return calls if _is_same(calls, again) else None

    def _repeat(self, sizes: Mapping[AttributePlace, int]) -> list[Call] | None:
        """Trace again and list what is called; None where the forward fails."""
        try:
            with self._trace(sizes=sizes) as graph:
                return list(_list_calls(graph))
        except StructureError:
            return None


def _list_calls(graph: fx.Graph) -> Iterator[Call]:
    """List what the nodes of a graph call and with what; what nodes give goes by their number."""
    numbers: dict[fx.Node, str] = {}
    for node in graph.nodes:
        target: Any = node.target
        if node.op == "get_attr" and target.rpartition(".")[2].startswith(CONSTANT):
            target = attrgetter(target)(graph.owning_module)
        # The message of an assertion may well name the number.
        is_assertion = get_operation_name(node) == "_assert"
        arguments = node.all_input_nodes if is_assertion else (node.args, node.kwargs)
        yield node.op, target, map_arg(arguments, numbers.__getitem__)
        numbers[node] = f"%{len(numbers)}"


def _is_same(first: Any, second: Any) -> bool:
    """Tell whether two traces hold the same; numbers that know where they are from may differ."""
    if isinstance(first, SizeAttribute):
        return True
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and _is_same_tensor(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(_is_same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_is_same(first[key], second[key]) for key in first)
    if isinstance(first, slice):
        return all(_is_same(getattr(first, n), getattr(second, n)) for n in ("start", "stop", "step"))
    return bool(first == second or (first != first and second != second))


def _is_same_tensor(first: Tensor, second: Tensor) -> bool:
    if (first.shape, first.dtype, first.device) != (second.shape, second.dtype, second.device):
        return False
    return first.is_meta or torch.equal(first, second)
