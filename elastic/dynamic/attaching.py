"""Kernel activation modules (`elastic.kam`) attached to any CNN, where what is off need not be read."""

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.modules import KINDS, Choice, SetNorm, Site
from elastic.errors import StructureError
from elastic.widths.discovery import Width, Widths
from elastic.widths.tracing import BATCH_NORM, get_layer, get_operation_name, trace_both_modes

MODULES = "kams"  # where a network holds them

# What keeps zeros: maps that are off stay off on their way to what reads them.
KEEPS_ZERO: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
    *(nn.Hardswish, nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
KEEPS_ZERO_BY_NAME = set(
    """
    relu relu6 leaky_relu elu selu celu gelu silu mish tanh hardswish flatten view reshape dropout dropout2d
    max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d boolean_dispatch mean contiguous
    """.split()
)
ASKS_FOR_SHAPE = {"size", "getattr", "dim"}


def attach_modules(
    net: nn.Module,
    widths: Widths,
    names: Iterable[str] | None = None,
    sets: int = 1,
    choice: Choice = "ramp",
    kind: str = "input",
) -> fx.GraphModule:
    """The network with a kernel activation module for each width; its layers are shared, under their names.

    Args:
        names: the widths whose kernels are switched; by default all that can be.
        kind: what the modules look at: the "input", or as controls nothing ("constant", "random").

    Raises:
        StructureError: the kernels of a width asked for cannot be switched, or of none can.
    """
    if kind not in KINDS:
        raise StructureError(f"modules cannot look at '{kind}': set kind to {', '.join(KINDS)}")
    traced = trace_both_modes(net)
    found = {name: _site(traced, widths[name]) for name in (widths if names is None else names)}
    refused = {name: site for name, site in found.items() if isinstance(site, str)}
    if refused and (names is not None or len(refused) == len(found)):
        name, why = next(iter(refused.items()))
        raise StructureError(f"the kernels of '{name}' cannot be switched off: {why}")
    traced.add_submodule(MODULES, nn.ModuleDict())
    for site in (site for site in found.values() if isinstance(site, Site)):
        conv = traced.get_submodule(site.writer)
        assert isinstance(conv, nn.Conv2d)
        module = KINDS[kind](site, conv.in_channels, conv.out_channels, sets, choice)
        module.order_scores(_worth(traced, site, conv.out_channels))
        path = f"{MODULES}.{site.writer.replace('.', '/')}"
        traced.add_submodule(path, module.to(conv.weight))
        _insert(traced, site, path)
    if sets > 1:
        _give_norms(traced, sets)
    traced.graph.lint()
    traced.recompile()
    return traced


# --- where modules go -----------------------------------------------------------------------------


def _calls(traced: fx.GraphModule, path: str) -> list[fx.Node]:
    return [node for node in traced.graph.nodes if node.op == "call_module" and node.target == path]


def _normed(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The batch norm that alone reads a layer, or the layer."""
    after = next(iter(node.users), None)
    alone = len(node.users) == 1 and after is not None and after.op == "call_module"
    return after if alone and isinstance(get_layer(traced, after), BATCH_NORM) else node  # type: ignore[return-value, arg-type]


def keeps_zero(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether maps of zeros are maps of zeros behind it."""
    layer = get_layer(traced, node)
    if layer is not None:
        return isinstance(layer, KEEPS_ZERO)
    return (
        node.op in ("call_function", "call_method")
        and get_operation_name(node).strip("_") in KEEPS_ZERO_BY_NAME
    )


def _site(traced: fx.GraphModule, width: Width) -> Site | str:
    """Where a width's kernels are, or why they cannot be switched."""
    writers = {slot.module for slot in width.slots_with("out")}
    if len(writers) != 1:
        return f"its maps are sums, {' and '.join(sorted(writers)[:2])} write them"
    if width.mixed is not None:
        return width.mixed
    (writer,) = writers
    layer: nn.Module | None = traced.get_submodule(writer)
    calls = _calls(traced, writer)
    assert layer is not None
    if type(layer) is not nn.Conv2d or layer.groups > 1:
        return f"{writer} ({type(layer).__name__}) is no ordinary convolution"
    if len(calls) != 1:
        return f"{writer} is used {len(calls)} times"
    if not calls[0].args:
        return f"{writer} is given what it reads by name"
    if width.size != layer.out_channels:
        return f"it is a part of the channels of {writer}"
    each: list[str] = []
    readers: list[str] = []
    waiting = [_normed(traced, calls[0])]
    while waiting:
        for user in waiting.pop().users:
            path, layer = str(user.target), get_layer(traced, user)
            if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1:
                if (count := len(_calls(traced, path))) != 1:
                    return f"{path} is used {count} times"
                each.append(path)
                waiting.append(_normed(traced, user))
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                readers.append(path)
            elif keeps_zero(traced, user):
                waiting.append(user)
            elif get_operation_name(user) not in ASKS_FOR_SHAPE:
                return f"{user.name} does more with its maps than to read them"
    return Site(writer, tuple(dict.fromkeys(readers)), tuple(each))


@torch.no_grad()
def _worth(traced: fx.GraphModule, site: Site, kernels: int) -> Tensor:
    """What each kernel's map moves in its readers: their weights for it, times the gain of its norm."""
    (call,) = _calls(traced, site.writer)
    gain = getattr(get_layer(traced, _normed(traced, call)), "weight", None)
    squared_K = torch.zeros(kernels)
    for layer in (traced.get_submodule(path) for path in site.readers):
        if getattr(layer, "groups", 1) == 1:
            of_kernels: Tensor = layer.weight.transpose(0, 1).unflatten(0, (kernels, -1))  # type: ignore[operator, union-attr]
            squared_K += of_kernels.flatten(1).square().sum(1).cpu()
    return squared_K if not isinstance(gain, Tensor) or gain.dim() > 1 else squared_K * gain.square().cpu()


def _give_norms(traced: fx.GraphModule, sets: int) -> None:
    """Statistics of its own for each set of modules, wherever statistics are kept."""
    held = traced.get_submodule(MODULES)
    assert isinstance(held, nn.ModuleDict)
    for node in traced.graph.nodes:
        norm, name = get_layer(traced, node), str(node.target).replace(".", "/")
        if isinstance(norm, BATCH_NORM) and norm.running_mean is not None:
            if name not in held:  # it may be called more than once
                held[name] = SetNorm(norm, sets)
            node.target = f"{MODULES}.{name}"


def _insert(traced: fx.GraphModule, site: Site, path: str) -> None:
    """Say which kernels are on before the convolution, and shut the others' maps behind it and its norm."""
    (conv,) = _calls(traced, site.writer)
    with traced.graph.inserting_before(conv):
        gate = traced.graph.call_module(path, (conv.args[0],))
    for layer in (site.writer, *site.depthwise):
        (call,) = _calls(traced, layer)
        end = _normed(traced, call)
        with traced.graph.inserting_after(end):
            shut = traced.graph.call_function(torch.mul, (end, gate))
        for user in [user for user in end.users if user is not shut]:
            user.replace_input_with(end, shut)
