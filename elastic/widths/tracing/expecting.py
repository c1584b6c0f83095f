"""Tell what an answer to a forward depends on, and hold a graph to it."""

import re

import torch
from torch import Tensor, fx

from elastic.errors import StructureError
from elastic.widths.tracing.patching import RANDOM, RANDOM_METHODS

SHAPE_ALONE = "getattr|size|dim|numel|new_.*|.*_like"  # what these give tells of no entry


def expect_same(value: object, expected: object) -> None:
    """Raise StructureError where a traced network would have gone another way.

    Raises:
        StructureError: the input is of another shape than that for which the network was traced.
    """
    if value != expected:
        raise StructureError(
            f"the network was traced for inputs of another shape ({expected} there is {value} here): "
            "give it inputs of the example's shape"
        )


def expect_held(value: object, expected: object) -> None:
    """Raise StructureError where a traced network would have gone another way by a number that it holds.

    Raises:
        StructureError: the number is another one than when the network was traced.
    """
    if value != expected:
        value = value.item() if isinstance(value, Tensor) else value
        raise StructureError(
            f"the network was traced where a number that it holds was {expected}, which is {value} now: run "
            "it once before, so that the number is what it stays"
        )


def expect_passed(value: object, answer: bool) -> None:
    """Raise StructureError where the data do not pass a check that a network makes.

    Raises:
        StructureError: the network itself raises an error for them.
    """
    if torch.compiler.is_exporting() or (isinstance(value, Tensor) and value.is_meta):  # there are no data
        return
    if bool(value) is not answer:
        raise StructureError(
            "the network's forward raises an error for this input: run it untraced to see which"
        )


def expect_default(value: object, default: object, name: str) -> None:
    """Raise StructureError where a traced network is given another value than the one it was traced with.

    Raises:
        StructureError: always then.
    """
    if type(value) is not type(default) or value != default:
        raise StructureError(
            f"the network was traced with {name}={default!r}, as it is by default: leave it out"
        )


def changes_tensor(node: fx.Node) -> bool:
    """Tell whether a node calls a method that changes its tensor, perhaps also its shape: `unsqueeze_`."""
    name = str(node.target)
    return node.op == "call_method" and name.endswith("_") and not name.endswith("__")


def depends_on_inputs(node: fx.Node) -> bool:
    """Tell whether a node computes with one of the inputs."""
    visited, pending = set[fx.Node](), [node]
    while pending:
        source = pending.pop()
        if source.op == "placeholder":
            return True
        if source not in visited:
            visited.add(source)
            pending += source.all_input_nodes
    return False


def is_checked_alone(node: fx.Node) -> bool:
    """Tell whether a forward looks at what a node gives to raise an error, and computes nothing with it."""
    checks = node.graph.find_nodes(op="call_function", target=expect_passed)
    visited, pending = set(checks), [node] if checks else []
    while pending:
        source = pending.pop()
        if source not in visited:
            if not source.users:
                return False
            visited.add(source)
            pending += source.users
    return bool(checks)


def is_drawn(node: fx.Node) -> bool:
    """Tell whether a node computes with random numbers, and with no input but its shape or type."""
    visited, pending, is_drawn = set[fx.Node](), [node], False
    while pending:
        source = pending.pop()
        name = source.target if isinstance(source.target, str) else getattr(source.target, "__name__", "")
        if source.op in ("placeholder", "call_module"):
            return False
        is_drawn = is_drawn or name.removesuffix("_like") in (*RANDOM, *RANDOM_METHODS)
        if source not in visited and not re.fullmatch(SHAPE_ALONE, name):
            visited.add(source)
            pending += source.all_input_nodes[: 1 if name in ("to", "type_as") else None]
    return is_drawn
