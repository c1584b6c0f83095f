"""Offer what a rule works with: the axes of values, the arguments of a node, and the tracker.

A value's *axes* are one entry a dimension: an `Axis` where the dimension holds channels that may change,
`None` where it does not (batch, space, the model's input).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from elastic.errors import StructureError
from elastic.widths.union import Axis, ChannelUnion

Axes = tuple[Axis | None, ...]
Tracked = Axes | Sequence["Tracked"] | None  # of a tensor, of several tensors, of what holds no channels
Role = Literal["out", "in", "per_channel", "depthwise", "count"]
SIZE = "size"  # in a node's `meta`: the number that it gives, where that is a multiple of an attribute
LAYER = ""  # in place of a tensor's name: what the layer's own attributes say
ATTRIBUTE = ":"  # begins what stands in place of a tensor's name for an attribute that counts channels
Layer = TypeVar("Layer", bound=nn.Module)
PRODUCTS = ("mul", "imul", "multiply")  # zero where either factor is


class Place(NamedTuple):
    """Name a stored tensor."""

    module: str
    tensor: str


class NotFollowed(StructureError):
    """Say that a rule does not know a use of its operation: all that the node reads keeps its size."""


class Tracker(Protocol):
    """Answer what a rule asks of a node, and record what it says of channels."""

    elements: ChannelUnion

    def get_layer(self, node: fx.Node, kind: type[Layer]) -> Layer:
        """Get the layer that the node calls."""

    def get_module(self, path: str) -> nn.Module:
        """Get a part of the model."""

    def locate(self, tensor: fx.Node) -> Place:
        """Find where a tensor is stored that a function is given; NotFollowed where it is computed."""

    def begin(self, module: str, tensor: str, role: Role, dim: int = 0) -> Axis:
        """Let channels begin on a stored tensor: those that a layer writes, or that a parameter holds."""

    def record(self, module: str, tensor: str, dim: int, role: Role, axis: Axis | None) -> None:
        """Record that channels lie on a dimension of a stored tensor, where there is such a tensor."""

    def follow_size(self, size: object, axis: Axis | None) -> bool:
        """Let a number that the operation is given follow an axis' channels; False where it cannot.

        It can where it is an attribute of a module, which surgery then changes with them.
        """

    def drop(self, axes: Sequence[Axis | None]) -> None:
        """Note that what the node gives does not depend on these channels."""

    def unite(self, first: Axis | None, second: Axis | None, node: fx.Node) -> None:
        """Let two axes agree, channel by channel; one that never changes fixes the other."""

    def join(self, axis: Axis, groups: int, node: fx.Node, size: object = None) -> bool:
        """Let whole groups of channels come and go, so many of one size; False where they cannot.

        They cannot where only one would be left. Where the operation is given their number, `size`, that
        has to follow.
        """

    def mix(self, axes: Sequence[Axis | None], node: fx.Node, reason: str) -> None:
        """Note that the node takes statistics over channels; the reason goes on after its name."""

    def divide(self, axis: Axis, divisor: int, node: fx.Node, reason: str) -> None:
        """Keep an axis as it is, unless the forward cuts it so that it stays a multiple of a number."""

    def is_mixed(self, axis: Axis) -> bool:
        """Tell whether statistics have been taken over all of these channels."""

    def fix(self, axes: Sequence[Axis | None], node: fx.Node, reason: str) -> None:
        """Keep the channels of all axes as they are; the reason goes on after the node's name."""


# Carries the axes of what a node reads to what it gives.
Rule = Callable[[Tracker, fx.Node], Tracked]


def get_argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    """Get what a call gives for a parameter, by position or by one of its names."""
    if len(node.args) > position:
        return resolve_sizes(node.args[position])
    return next((resolve_sizes(node.kwargs[name]) for name in names if name in node.kwargs), default)


def list_arguments(node: fx.Node, position: int, *names: str) -> list[Any]:
    """List numbers that a call gives as one sequence or one by one, from a position on or by a name."""
    argument = get_argument(node, position, *names)
    return list(argument if isinstance(argument, tuple | list) else map(resolve_sizes, node.args[position:]))


def resolve_sizes(argument: Any) -> Any:
    """Put the multiples of attributes in place of the nodes that compute them."""
    if type(argument) in (tuple, list):
        return type(argument)(map(resolve_sizes, argument))
    return argument.meta.get(SIZE, argument) if isinstance(argument, fx.Node) else argument


def get_input(node: fx.Node) -> fx.Node:
    """Get the tensor that an operation works on: its first argument.

    Raises:
        NotFollowed: it is no tensor of the graph.
    """
    source = get_argument(node, 0, "input", "x", "self")
    if not isinstance(source, fx.Node):
        raise NotFollowed("does not begin with a tensor")
    return source


def is_stored(tensor: str) -> bool:
    """Tell whether a slot's tensor is one, and does not stand for attributes."""
    return not tensor.startswith(ATTRIBUTE) and tensor != LAYER


def get_operation_name(node: fx.Node) -> str:
    """Name the function, the method or the layer that a node calls: `relu_`, `add`, `stage1.0`."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def get_value(argument: Any) -> Any:
    """Get a value as the example gives it: of a node's output, or the argument itself."""
    return argument.meta["value"] if isinstance(argument, fx.Node) else argument


def get_shape(node: fx.Node) -> torch.Size:
    """Get the shape of what a node gives.

    Raises:
        NotFollowed: it gives no tensor, or several.
    """
    value = get_value(node)
    if not isinstance(value, Tensor):
        raise NotFollowed(f"gives a {type(value).__name__}, not one tensor")
    return value.shape


def get_axes(node: fx.Node) -> Axes:
    """Get the channel axes of the tensor that a node gives."""
    axes: Axes = node.meta["axes"]
    return axes or ()


def list_axes(tracked: Tracked | Axis) -> list[Axis]:
    """List the axes of one tensor or of several."""
    if isinstance(tracked, np.ndarray):
        return [tracked]
    axes: list[Axis] = []
    for part in tracked or ():
        if isinstance(part, np.ndarray):
            axes.append(part)
        elif part is not None:
            axes += list_axes(part)
    return axes


def list_tensors(node: fx.Node) -> list[fx.Node]:
    """List the tensors that a node reads."""
    return [source for source in node.all_input_nodes if source.meta.get("axes") is not None]


def normalize_dims(dims: int | Sequence[int] | None, ndim: int) -> list[int]:
    """Count dimensions from the front; None stands for all."""
    if dims is None:
        return list(range(ndim))
    return [d % ndim for d in ((dims,) if isinstance(dims, int) else dims)]
