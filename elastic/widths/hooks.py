"""Watch the hooks of a traced model's layers, which torch.fx does not look into, and keep hooks quiet."""

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, fx, nn

from elastic.widths.functions import list_contents
from elastic.widths.leaves import list_versions
from elastic.widths.parameters import computes_weight
from elastic.widths.tracing.meta import run_without_data

Hook = Callable[..., Any]
CONTAINERS = (dict, list, set, deque)
KEEP_NOTHING = (type, ModuleType, Tensor)
LOOKS = "looks_on"  # an attribute of the target of a node that calls a hook, or keeps a value in a module
KEEPS = "keeps"  # its value in the latter case
INTERNAL = vars(nn.Module()).keys()  # what torch itself holds in a module


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has hooks that run when it is called."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def list_hooks(model: nn.Module, recurse: bool = True) -> list[tuple[dict[int, Hook], int, Hook]]:
    """List the hooks that run when a module or a part of it is called: their table, their key, themselves."""
    modules = model.modules() if recurse else [model]
    tables = [hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
    return [(hooks, key, hook) for hooks in tables for key, hook in hooks.items()]


def is_look(node: fx.Node) -> bool:
    """Tell whether a traced network's node only looks on, as the call of a hook does."""
    return bool(getattr(node.target, LOOKS, False))


def keeps_value(node: fx.Node) -> bool:
    """Tell whether a traced network's node keeps a value in one of the modules that it was traced from."""
    return getattr(node.target, LOOKS, False) == KEEPS


def list_containers(model: nn.Module) -> list[Any]:
    """List the lists and dictionaries that are attributes of a model's modules, each once."""
    attributes = (item for module in model.modules() for item in vars(module).items())
    values = [value for name, value in attributes if name not in INTERNAL and type(value) in (list, dict)]
    return list({id(value): value for value in values}.values())


@contextmanager
def quiet_hooks(model: nn.Module) -> Iterator[None]:
    """Take back what hooks of a program keep, say in a list, while its model runs without being called by it.

    Of the model itself nothing is taken back: hooks may compute its weights.
    """
    with ExitStack() as stack:
        for container in _list_hook_containers(model):
            stack.enter_context(_taking_back(container))
        yield


def _list_hook_containers(model: nn.Module) -> list[Any]:
    """List what hooks can keep things in: containers, and attributes of objects, that they hold."""
    parts = set(map(id, model.modules()))
    containers: dict[int, Any] = {}
    pending: list[Any] = [hook for _, _, hook in list_hooks(model)]
    pending += (node.target for graph in _list_graphs(model) for node in graph.nodes if is_look(node))
    while pending:
        value = pending.pop()
        if isinstance(value, CONTAINERS):
            if id(value) not in containers:
                containers[id(value)] = value
                pending += _select_containers(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, partial):
            pending += (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, MethodType):
            pending += (value.__func__, value.__self__)
        elif isinstance(value, FunctionType):
            names = value.__code__.co_names
            pending += _select_containers(value.__globals__.get(name) for name in names)
            pending += list_contents(value)
        elif hasattr(value, "__dict__") and not isinstance(value, KEEP_NOTHING) and id(value) not in parts:
            attributes = vars(value)
            containers[id(attributes)] = attributes
            pending += _select_containers(
                content for name, content in attributes.items() if name not in INTERNAL
            )
    return list(containers.values())


def _list_graphs(model: nn.Module) -> list[fx.Graph]:
    traced = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    graphs = [graph for m in traced for graph in (m.graph, getattr(m, "training_graph", None))]
    return [graph for graph in graphs if graph is not None]


def _select_containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, CONTAINERS)]


@contextmanager
def _taking_back(container: Any) -> Iterator[None]:
    """Bring a container back to what it holds now."""
    content = container.copy()
    try:
        yield
    finally:
        if isinstance(container, dict):
            for key in container.keys() - content.keys():
                del container[key]
            container.update(content)
        elif isinstance(container, set):
            container.intersection_update(content)
            container.update(content)
        elif len(content) != len(container) or any(map(operator.is_not, content, container)):
            container.clear()
            container.extend(content)


def watch_hooks(layers: Mapping[str, nn.Module]) -> set[str]:
    """Watch all forward hooks of layers, in place: collect the paths of those that one may change."""
    changed: set[str] = set()
    for path, module in layers.items():
        for hooks, key, hook in list_hooks(module, recurse=False):
            if not computes_weight(hook):
                hooks[key] = partial(_run_watched, hook, changed, path)
    return changed


def _run_watched(hook: Hook, changed: set[str], path: str, module: nn.Module, *values: Any) -> Any:
    """Run a hook on tensors without data; what it returns or writes, and a failure, count as a change."""
    before = list_versions(values)
    try:
        with run_without_data():
            result = hook(module, *values)
    except Exception:  # it may look at numbers, which are not there
        result = None
        changed.add(path)
    is_kept = result is None or any(result is value for value in _list_kept(values))
    if not is_kept or list_versions(values) != before:
        changed.add(path)
    return result


def _list_kept(values: tuple[Any, ...]) -> Iterator[Any]:
    """List what a hook may return that changes nothing: the output, or all inputs, or the only one."""
    yield values[-1]
    if len(values) == 1 and len(values[0]) == 1:
        yield values[0][0]
