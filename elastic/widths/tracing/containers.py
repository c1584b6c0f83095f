"""Let a traced network keep in lists and dictionaries of its modules what its forward keeps there."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from elastic.widths.copying import ATOMS
from elastic.widths.hooks import KEEPS, LOOKS, list_containers, list_hooks

MARK = object()  # put into a list that is empty, to see whether the forward empties it


@dataclass
class Container:
    """Hold a list or a dictionary of a module, and what a forward has made of it while it was traced.

    Attributes:
        appends: whether the forward leaves in a list what is there; None where that cannot be told of one
            that was empty.
        is_kept: whether it has been given tensors, and nothing else.
    """

    value: Any
    before: Any = field(init=False)
    after: Any = field(init=False)
    appends: bool | None = False
    is_kept: bool = False

    def __post_init__(self) -> None:
        self.before = copy.copy(self.value)

    def note(self) -> None:
        """Note what the container holds now, and whether a list holds first what it did before."""
        self.after = copy.copy(self.value)
        if type(self.value) is list:
            is_longer = all(a is b for a, b in zip(self.before, self.after, strict=False))
            self.appends = is_longer and len(self.after) >= len(self.before) if self.before else None

    def list_new(self) -> Any:
        """List what a list has got, or the entries that a dictionary has."""
        if type(self.value) is list:
            return self.after[len(self.before) :] if self.appends else self.after
        return {key: v for key, v in self.after.items() if self.before.get(key, MARK) is not v}

    def keep(self, new: Any) -> None:
        """Keep what the traced network gives, as its forward would."""
        if type(self.value) is dict:
            self.value.update(new)
            return
        if not self.appends:
            self.value.clear()
        self.value.extend(new)


def watch_containers(model: nn.Module) -> list[Container]:
    """Hold the lists and dictionaries of modules, to see what a forward makes of them.

    None where hooks are called: these may keep things there, too, and do so in a traced network.
    """
    return [] if list_hooks(model) else [Container(value) for value in list_containers(model)]


def trace_contents(
    tracer: fx.Tracer, containers: Sequence[Container], gives_tensor: Callable[[fx.Node], bool]
) -> None:
    """Make a node of each container that the forward which has been traced has given tensors."""
    (output,) = tracer.graph.find_nodes(op="output")
    with tracer.graph.inserting_before(output):
        for container in containers:
            container.note()
            new = container.list_new()
            keys = new if isinstance(new, dict) else ()  # of sizes, as caches have them, a graph has none
            leaves = tree_leaves(new) if all(type(key) in ATOMS for key in keys) else []
            nodes = [leaf.node for leaf in leaves if isinstance(leaf, fx.Proxy)]
            if nodes and len(nodes) == len(leaves) and all(map(gives_tensor, nodes)):
                tracer.create_proxy("call_function", _make_keep(container), (new,), {})
                container.is_kept = True


@contextmanager
def mark_lists(containers: Sequence[Container]) -> Iterator[None]:
    """Mark lists, of which it is not known whether the forward empties them, while it is traced."""
    for container in containers:
        container.value.append(MARK)
    try:
        yield
    finally:
        for container in containers:
            container.value.remove(MARK)


def _make_keep(container: Container) -> Callable[[Any], None]:
    def keep(new: Any) -> None:
        container.keep(new)

    setattr(keep, LOOKS, KEEPS)
    return keep
