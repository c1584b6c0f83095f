"""Watch the hooks of a traced model's layers: torch.fx does not look into them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Hook = Callable[..., Any]


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has hooks that run when it is called."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def watch_hooks(layers: Mapping[str, nn.Module]) -> set[str]:
    """Watch all forward hooks of layers, in place: collect the paths of those that one may change."""
    changed: set[str] = set()
    for path, module in layers.items():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                hooks[key] = partial(_run_watched, hook, changed, path)
    return changed


def _run_watched(hook: Hook, changed: set[str], path: str, module: nn.Module, *values: Any) -> Any:
    """Run a hook on tensors without data; what it returns or writes, and a failure, count as a change."""
    before = _list_versions(values)
    try:
        result = hook(module, *values)
    except Exception:  # it may look at numbers, which are not there
        result = None
        changed.add(path)
    is_kept = result is None or any(result is value for value in _list_kept(values))
    if not is_kept or _list_versions(values) != before:
        changed.add(path)
    return result


def _list_kept(values: tuple[Any, ...]) -> Iterator[Any]:
    """List what a hook may return that changes nothing: the output, or all inputs, or the only one."""
    yield values[-1]
    if len(values) == 1 and len(values[0]) == 1:
        yield values[0][0]


def _list_versions(values: Any) -> list[int]:
    """List how often each tensor has been written to."""
    return [value._version for value in tree_leaves(values) if isinstance(value, Tensor)]
