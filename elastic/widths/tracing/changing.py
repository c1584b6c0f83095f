"""Tell which tensor a node of a trace changes in place, and what else is that tensor or a view of it."""

import inspect
import operator
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import fx, nn

from elastic.widths.operations.interface import get_argument, get_operation_name

# What assigns in place, `x += y`, and what gives the same as a tensor of its own.
ANEW = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
ASSIGNMENTS = {*ANEW, operator.setitem, setattr}

# Operations that give a view of a tensor, or the tensor itself, if they can; attributes that do.
VIEWS = {
    *("detach", "getitem", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel"),
    *("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "narrow", "select"),
    *("squeeze", "unsqueeze", "expand", "expand_as", "chunk", "split", "tensor_split", "unbind", "diagonal"),
    *("contiguous", "to", "type", "type_as", "float", "dropout"),
}
VIEW_ATTRIBUTES = {"data", "T", "mT"}
SAME_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


def find_changed(node: fx.Node, layer: nn.Module | None = None) -> fx.Node | None:
    """Find what a node changes: by its name (`relu_`, `iadd`), its flag `inplace`, or as `out`.

    Args:
        layer: the one that the node calls, if it calls one.
    """
    if node.op not in ("call_module", "call_function", "call_method"):
        return None
    changed = node.kwargs.get("out")
    if changed is None and (getattr(layer, "inplace", False) if layer is not None else _changes_first(node)):
        changed = get_argument(node, 0, "input")
    return changed if isinstance(changed, fx.Node) else None


def _changes_first(node: fx.Node) -> bool:
    """Tell whether a function or a method changes its first argument."""
    name = get_operation_name(node)
    if node.target in ASSIGNMENTS or (name.endswith("_") and not name.endswith("__")):
        return True
    parameters = _list_parameters(node.target) if callable(node.target) else []
    if "inplace" not in parameters:
        return False
    return get_argument(node, parameters.index("inplace"), "inplace") is True


@cache
def _list_parameters(function: Callable[..., Any]) -> list[str]:
    """List the parameters of a function; none of one that is written in C."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def find_viewed(node: fx.Node, layer: nn.Module | None = None) -> fx.Node | None:
    """Find the tensor that a node gives a view of, or as it is.

    Args:
        layer: the one that the node calls, if it calls one; an input or a layer may be called `view`.
    """
    if node.op not in ("call_module", "call_function", "call_method"):
        return None
    name = get_operation_name(node)
    is_attribute = name == "getattr" and node.args[1] in VIEW_ATTRIBUTES
    is_same = isinstance(layer, SAME_LAYERS) if layer is not None else is_attribute or name in VIEWS
    viewed = get_argument(node, 0, "input") if is_same else None
    return viewed if isinstance(viewed, fx.Node) else None


def find_written(
    node: fx.Node,
    get_layer: Callable[[fx.Node], nn.Module | None],
    get_module: Callable[[str], nn.Module],
) -> fx.Node | None:
    """Find the parameter whose values a node changes, itself or by a view of it."""
    source = find_changed(node, get_layer(node))
    while source is not None and source.op != "get_attr":
        source = find_viewed(source, get_layer(source))
    if source is None:
        return None
    path, _, name = str(source.target).rpartition(".")
    return source if name in get_module(path)._parameters else None


def renew_assigned(
    graph: fx.Graph,
    get_layer: Callable[[fx.Node], nn.Module | None],
    is_tensor: Callable[[fx.Node], bool],
) -> None:
    """Let `x += y` be `x = x + y` wherever nothing else sees x change.

    It does where x, or a view of it, is read later; or where a module holds it.

    Args:
        is_tensor: tells whether a node gives a tensor; a number is never changed.
    """
    places = {node: k for k, node in enumerate(graph.nodes)}
    sources: dict[fx.Node, fx.Node] = {}  # of what is the same tensor, or a view of it
    aliases: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        layer = get_layer(node)
        shared = find_changed(node, layer) or find_viewed(node, layer)
        if shared is None:
            continue
        source = sources.get(shared, shared)
        if node.target in ANEW:
            readers = (user for alias in (source, *aliases[source]) for user in alias.users)
            is_seen = source.op == "get_attr" or any(places[user] > places[node] for user in readers)
            if not (is_seen and is_tensor(shared)):
                node.target = ANEW[node.target]
                continue
        sources[node] = source
        aliases[source].append(node)
