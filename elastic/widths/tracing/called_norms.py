"""Make layers again of batch norms whose forward calls a function, such as timm's with their activations."""

import inspect
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from elastic.widths.hooks import has_hooks
from elastic.widths.tracing.meta import BATCH_NORM

SIGNATURE = inspect.signature(F.batch_norm)
TENSORS = ("running_mean", "running_var", "weight", "bias")


def restore_norms(traced: fx.GraphModule, model: nn.Module) -> None:
    """Call a layer of torch's own in place of the function, where it is given what one batch norm has.

    The layer shares its tensors with the model's norm, whose forward does more.
    """
    calls = traced.graph.find_nodes(op="call_function", target=F.batch_norm)
    for node in calls:
        call = SIGNATURE.bind(*node.args, **node.kwargs)
        call.apply_defaults()
        path = _find_norm(traced, model, call.arguments)
        if path is None:
            continue
        owner, _, name = path.rpartition(".")
        setattr(traced.get_submodule(owner), name, _make_plain(model.get_submodule(path)))
        with traced.graph.inserting_before(node):
            layer = traced.graph.call_module(path, (call.arguments["input"],))
        layer.meta = node.meta
        node.replace_all_uses_with(layer)
        read = [call.arguments[name] for name in TENSORS]
        for unused in (node, *(tensor for tensor in read if isinstance(tensor, fx.Node))):
            if not unused.users:
                traced.graph.erase_node(unused)
    if calls:
        traced.recompile()


def _find_norm(traced: fx.GraphModule, model: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Find the path of the norm whose tensors, numbers and mode a call is given."""
    mean = arguments["running_mean"]
    if not isinstance(mean, fx.Node) or mean.op != "get_attr":
        return None
    path = str(mean.target).rpartition(".")[0]
    norm, owner = model.get_submodule(path), traced.get_submodule(path.rpartition(".")[0])
    is_ours = owner is traced or type(owner) is nn.Module  # not the model's own
    if not is_ours or not isinstance(norm, BATCH_NORM) or has_hooks(norm):
        return None
    names = {name: None if getattr(norm, name) is None else f"{path}.{name}" for name in TENSORS}
    given = {name: getattr(arguments[name], "target", None) for name in TENSORS}
    numbers = [arguments[name] for name in ("training", "momentum", "eps")]
    return path if given == names and numbers == [norm.training, norm.momentum, norm.eps] else None


def _make_plain(norm: nn.Module) -> nn.Module:
    """Make a layer of torch's own with all that a subclass of it holds."""
    kind = next(base for base in type(norm).__mro__ if base.__module__.startswith("torch.nn."))
    plain: Any = object.__new__(kind)
    vars(plain).update(vars(norm))
    layer: nn.Module = plain
    return layer
