"""Let a traced network do what torch.fx leaves out: call hooks that look on, keep tensors in attributes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import takewhile
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from elastic.widths.hooks import INTERNAL, KEEPS, LOOKS, Hook, list_hooks

_Call = tuple[fx.Node, list[fx.Node]]  # of a hook: by a node, and what it did while it was traced


@contextmanager
def trace_hooks(tracer: fx.Tracer, model: nn.Module) -> Iterator[None]:
    """Make a node of each call of a hook that only looks on, in place of what it does then.

    Hooks of layers that stay whole are called by these. What a hook returns, or the forward reads of it, is a
    part of the graph already.
    """
    hooks, calls = list_hooks(model), list[_Call]()
    for table, key, hook in hooks:
        table[key] = partial(_trace_hook, tracer, calls, hook)
    try:
        yield
    finally:
        for table, key, hook in hooks:
            table[key] = hook
    left_out = set[fx.Node]()
    for look, nodes in reversed(calls):
        is_read = any(user not in {*nodes, *left_out} for node in nodes for user in node.users)
        left_out.update([look] if is_read else nodes)
    for node in reversed(tracer.graph.nodes):
        if node in left_out:
            tracer.graph.erase_node(node)


def _trace_hook(tracer: fx.Tracer, calls: list[_Call], hook: Hook, module: nn.Module, *values: Any) -> Any:
    last = next(iter(reversed(tracer.graph.nodes)))  # which is no iterator by itself before torch 2.13
    result = hook(module, *values)
    if result is None:
        nodes = [*takewhile(lambda node: node is not last, reversed(tracer.graph.nodes))]
        with suppress(NotImplementedError):  # it is given what no graph holds
            look = tracer.create_proxy("call_function", _make_look(hook, module), values, {})
            calls.append((look.node, [node for node in nodes if node.op != "get_attr"]))
    return result


def _make_look(hook: Hook, module: nn.Module) -> Callable[..., None]:
    """Make a function that calls a hook for as long as its module has it."""

    def look(*values: Any) -> None:
        if any(own is hook for _, _, own in list_hooks(module, recurse=False)):
            hook(module, *values)

    setattr(look, LOOKS, True)
    return look


def list_kept(model: nn.Module) -> list[fx.Node]:
    """List the nodes that a forward which has been traced has left in its modules, for the program."""
    attributes = [item for module in model.modules() for item in vars(module).items()]
    leaves = tree_leaves([value for name, value in attributes if name not in INTERNAL])
    return [leaf.node for leaf in leaves if issubclass(type(leaf), fx.Proxy)]


def trace_kept(
    tracer: fx.Tracer,
    model: nn.Module,
    earlier_values: Sequence[Any],
    gives_tensor: Callable[[fx.Node], bool],
) -> None:
    """Make a node of each attribute that the forward which has been traced has given a tensor, or several.

    Args:
        earlier_values: what attributes have held before, caches among others, which are not kept anew.
        gives_tensor: tells whether a node gives one.
    """
    before = set(map(id, earlier_values))
    (output,) = tracer.graph.find_nodes(op="output")
    with tracer.graph.inserting_before(output):
        for module in model.modules():
            for name, value in vars(module).items():
                is_kept = name not in INTERNAL and id(value) not in before
                leaves = tree_leaves(value) if is_kept else []
                nodes = [leaf.node for leaf in leaves if isinstance(leaf, fx.Proxy)]
                if nodes and all(map(gives_tensor, nodes)):
                    tracer.create_proxy("call_function", _make_keep(module, name), (value,), {})


def _make_keep(module: nn.Module, name: str) -> Callable[[Any], None]:
    """Make a function that gives a module an attribute."""

    def keep(value: Any) -> None:
        setattr(module, name, value)

    setattr(keep, LOOKS, KEEPS)
    return keep
