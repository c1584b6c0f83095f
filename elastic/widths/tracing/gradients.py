"""Follow where a forward keeps gradients away: `torch.no_grad()`, `x.detach()`."""

import operator
from collections.abc import Callable

from torch import fx, nn

from elastic.widths.leaves import list_tensors
from elastic.widths.operations.interface import get_operation_name
from elastic.widths.tracing.changing import find_changed

GRADIENT = "gradient"  # in a node's `meta`: whether gradients are computed there; "own" within a function's
DETACHED = {"data", "detach", "detach_"}


def cut_gradients(graph: fx.Graph, gives_tensor: Callable[[fx.Node], bool]) -> None:
    """Detach what a forward computes without gradients where it goes on with them; fx keeps no such modes.

    Args:
        gives_tensor: tells whether a node gives a tensor.
    """
    for node in list(graph.nodes):
        if has_gradient(node):
            continue
        users = [user for user in node.users if has_gradient(user)]
        if users and gives_tensor(node):
            with graph.inserting_after(node):
                detached = graph.call_method("detach", (node,))
            for user in users:
                user.replace_input_with(node, detached)
        else:  # of several tensors, each is taken first
            for user in users:
                if user.target is operator.getitem and user.args[0] is node:
                    user.meta[GRADIENT] = False


def find_untrained(graph: fx.Graph, get_layer: Callable[[fx.Node], nn.Module | None]) -> frozenset[str]:
    """Find the modules whose parameters no output's gradient reaches, of a graph whose nodes have values."""
    nodes = list(graph.nodes)
    changing = {node for node in nodes if find_changed(node, get_layer(node)) is not None}
    # What changes a tensor is read wherever that is; what nothing reads may be kept by a module, for a loss.
    pending = [node for node in nodes if node.op == "output" or not node.users or node in changing]
    reached = set[fx.Node]()
    while pending:
        node = pending.pop()
        gives_tensors = node in changing or bool(list_tensors(node.meta["value"]))
        if node not in reached and gives_tensors and not _is_cut(node):
            reached.add(node)
            pending += node.all_input_nodes
    paths = {node: _find_owner(node) for node in nodes if node.op in ("call_module", "get_attr")}
    return frozenset(paths.values()) - {path for node, path in paths.items() if node in reached}


def has_gradient(node: fx.Node) -> bool:
    """Tell whether gradients are computed where a node is."""
    return node.meta.get(GRADIENT) is not False


def _is_cut(node: fx.Node) -> bool:
    """Tell whether no gradient goes through a node."""
    if node.meta.get(GRADIENT) == "own":
        return False
    name = get_operation_name(node) if node.op in ("call_function", "call_method") else ""
    is_detached = name in DETACHED or (name == "getattr" and node.args[1] in DETACHED)
    return is_detached or not has_gradient(node)


def _find_owner(node: fx.Node) -> str:
    """Find the module that a node calls, or whose tensor it reads."""
    return str(node.target) if node.op == "call_module" else str(node.target).rpartition(".")[0]
