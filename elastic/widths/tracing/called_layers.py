"""Make layers again of those whose forward calls a function, such as timm's norms with their activations."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from elastic.widths.hooks import has_hooks
from elastic.widths.tracing.meta import BATCH_NORM, FORWARD

_Function = Callable[..., Any]

NORM = inspect.signature(F.batch_norm)
# torch's own is built in, and has none.
CONVOLUTION = inspect.signature(
    lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None
)
_Call = tuple[inspect.Signature, tuple[str, ...], tuple[str, ...]]
CONVOLVE: _Call = (CONVOLUTION, ("weight", "bias"), ("stride", "padding", "dilation", "groups"))
# For each function: its arguments, those that are a layer's tensors, and those that are its numbers.
CALLS: dict[_Function, _Call] = {
    F.batch_norm: (NORM, ("running_mean", "running_var", "weight", "bias"), ("training", "momentum", "eps")),
    F.group_norm: (inspect.signature(F.group_norm), ("weight", "bias"), ("num_groups", "eps")),
    F.conv1d: CONVOLVE,
    F.conv2d: CONVOLVE,
    F.conv3d: CONVOLVE,
}


def restore_layers(traced: fx.GraphModule, model: nn.Module) -> None:
    """Call a layer of torch's own in place of the function, where it is given what one layer has.

    The layer shares its tensors with the model's, whose forward does more.
    """
    calls = [(node, call) for f, call in CALLS.items() for node in _find_calls(traced, f)]
    for node, (signature, tensors, numbers) in calls:
        call = signature.bind(*node.args, **node.kwargs)
        call.apply_defaults()
        path = _find_layer(traced, model, call.arguments, tensors, numbers)
        if path is None:
            continue
        owner, _, name = path.rpartition(".")
        setattr(traced.get_submodule(owner), name, _make_plain(model.get_submodule(path)))
        with traced.graph.inserting_before(node):
            layer = traced.graph.call_module(path, (call.arguments["input"],))
        layer.meta = node.meta
        node.replace_all_uses_with(layer)
        read = [call.arguments[name] for name in tensors]
        for unused in (node, *(tensor for tensor in read if isinstance(tensor, fx.Node))):
            if not unused.users:
                traced.graph.erase_node(unused)
    if calls:
        traced.recompile()


def _find_calls(traced: fx.GraphModule, function: _Function) -> list[fx.Node]:
    return traced.graph.find_nodes(op="call_function", target=function)


def _find_layer(
    traced: fx.GraphModule,
    model: nn.Module,
    arguments: Mapping[str, Any],
    tensors: tuple[str, ...],
    numbers: tuple[str, ...],
) -> str | None:
    """Find the path of the layer whose tensors, numbers and mode a call is given."""
    first = arguments[tensors[0]]
    if not isinstance(first, fx.Node) or first.op != "get_attr":
        return None
    path = str(first.target).rpartition(".")[0]
    layer, owner = model.get_submodule(path), traced.get_submodule(path.rpartition(".")[0])
    is_ours = owner is traced or type(owner) is nn.Module  # not the model's own
    pads_zeros = getattr(layer, "padding_mode", "zeros") == "zeros"
    kinds = BATCH_NORM | nn.GroupNorm | nn.Conv1d | nn.Conv2d | nn.Conv3d
    is_known = isinstance(layer, kinds) and pads_zeros
    if not is_ours or not is_known or has_hooks(layer):
        return None
    names = {name: None if getattr(layer, name) is None else f"{path}.{name}" for name in tensors}
    paths = {name: getattr(arguments[name], "target", None) for name in tensors}
    is_same = all(_are_same(arguments[name], getattr(layer, name)) for name in numbers)
    return path if paths == names and is_same else None


def _are_same(argument: Any, attribute: Any) -> bool:
    """Compare numbers, where one may stand for all dimensions."""
    pair = [
        tuple(numbers) if isinstance(numbers, tuple | list) else (numbers,)
        for numbers in (argument, attribute)
    ]
    longest = max(map(len, pair))
    first, second = (numbers * longest if len(numbers) == 1 else numbers for numbers in pair)
    return first == second


class _Norm(nn.BatchNorm2d):
    """Stand for a norm whose class is made of that of all batch norms, which asks for no dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def _make_plain(layer: nn.Module) -> nn.Module:
    """Make a layer of torch's own with all that a subclass of it holds, but for a forward of its own."""
    kind = next(base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn."))
    plain: Any = object.__new__(_Norm if kind is BATCH_NORM else kind)
    vars(plain).update({name: value for name, value in vars(layer).items() if name != FORWARD})
    copy: nn.Module = plain
    return copy
