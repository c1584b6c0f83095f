"""Tell which operations keep zeros: maps that are off stay off on their way to what reads them."""

import operator
from collections.abc import Collection

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from elastic.widths.operations.interface import PRODUCTS
from elastic.widths.tracing import get_layer, get_operation_name
from elastic.widths.tracing.changing import find_changed

# Each function, or method, that makes zeros of zeros, and the layer that does the same. Torch's poolings that
# can return indices, too, are `boolean_dispatch` to torch.fx.
KEEPS_ZEROS: dict[str, type[nn.Module] | None] = {
    **{"relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "selu": nn.SELU},
    **{"celu": nn.CELU, "gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish, "tanh": nn.Tanh},
    **{"hardswish": nn.Hardswish, "dropout": nn.Dropout, "dropout2d": nn.Dropout2d, "prelu": nn.PReLU},
    **{"rrelu": nn.RReLU, "softsign": nn.Softsign, "tanhshrink": nn.Tanhshrink, "hardshrink": nn.Hardshrink},
    **{"softshrink": nn.Softshrink, "lp_pool2d": nn.LPPool2d, "interpolate": None, "upsample": nn.Upsample},
    **{"upsample_nearest": nn.UpsamplingNearest2d, "upsample_bilinear": nn.UpsamplingBilinear2d},
    **{"reflection_pad2d": nn.ReflectionPad2d, "replication_pad2d": nn.ReplicationPad2d},
    **{"circular_pad2d": nn.CircularPad2d},
    **dict.fromkeys(("abs", "neg", "square", "sign", "sin", "tan", "asin", "atan", "sinh", "asinh")),
    **dict.fromkeys(
        (
            "erf",
            "expm1",
            "log1p",
            "clone",
            "detach",
            "float",
            "double",
            "half",
            "bfloat16",
            "to",
            "type",
            "type_as",
        )
    ),
    **{"max_pool2d": nn.MaxPool2d, "avg_pool2d": nn.AvgPool2d, "boolean_dispatch": None, "mean": None},
    **{"adaptive_avg_pool2d": nn.AdaptiveAvgPool2d, "adaptive_max_pool2d": nn.AdaptiveMaxPool2d},
    **{"max_pool1d": nn.MaxPool1d, "avg_pool1d": nn.AvgPool1d, "dropout1d": nn.Dropout1d},
    **{"max_pool3d": nn.MaxPool3d, "avg_pool3d": nn.AvgPool3d, "dropout3d": nn.Dropout3d},
    **{"adaptive_avg_pool1d": nn.AdaptiveAvgPool1d, "adaptive_max_pool1d": nn.AdaptiveMaxPool1d},
    **{"adaptive_avg_pool3d": nn.AdaptiveAvgPool3d, "adaptive_max_pool3d": nn.AdaptiveMaxPool3d},
    **{"lp_pool1d": nn.LPPool1d, "zero_pad1d": nn.ZeroPad1d, "zero_pad3d": nn.ZeroPad3d},
    **{"reflection_pad1d": nn.ReflectionPad1d, "replication_pad1d": nn.ReplicationPad1d},
    **{"reflection_pad3d": nn.ReflectionPad3d, "replication_pad3d": nn.ReplicationPad3d},
    **{"circular_pad1d": nn.CircularPad1d, "circular_pad3d": nn.CircularPad3d},
    **{"flatten": nn.Flatten, "view": None, "reshape": None, "contiguous": None},
    **{"identity": nn.Identity, "zero_pad2d": nn.ZeroPad2d},
    **dict.fromkeys(PRODUCTS),
}
# These keep them by some of their arguments; what such a node makes of zeros is computed.
BY_ARGUMENTS: dict[str, type[nn.Module] | None] = {
    **{"hardtanh": nn.Hardtanh, "threshold": nn.Threshold, "constant_pad1d": nn.ConstantPad1d},
    **{"constant_pad2d": nn.ConstantPad2d, "constant_pad3d": nn.ConstantPad3d},
    **dict.fromkeys(("clamp", "clip", "pad", "div", "truediv", "true_divide", "divide", "pow")),
}
# These make a constant of zeros, entry by entry; those of `BY_ARGUMENTS` among them by some of theirs.
MAKES_CONSTANTS: dict[str, type[nn.Module] | None] = {
    **{"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid, "softplus": nn.Softplus},
    **{"logsigmoid": nn.LogSigmoid, "hardtanh": nn.Hardtanh, "threshold": nn.Threshold},
    **dict.fromkeys(("clamp", "clip", "exp", "cos", "cosh", "add", "iadd", "sub", "isub", "rsub")),
}
RESHAPES = {"flatten", "view", "reshape"}  # of those, the ones behind which channels lie elsewhere
READS_SHAPE = {"size", "getattr", "dim"}
JOINS = {"cat", "concat", "concatenate"}
TABLES = KEEPS_ZEROS | BY_ARGUMENTS | MAKES_CONSTANTS
NAMES = {layer: name for name, layer in TABLES.items() if layer is not None}


def name_operation(traced: nn.Module, node: fx.Node) -> str:
    """Name what a node does, as `KEEPS_ZEROS` does, whether a layer does it, a function or a method."""
    layer = get_layer(traced, node)
    if layer is not None:
        return NAMES.get(type(layer), "")
    return get_operation_name(node).strip("_") if node.op in ("call_function", "call_method") else ""


def works_in_place(traced: nn.Module, node: fx.Node) -> bool:
    """Tell whether a node changes what it reads."""
    return find_changed(node, get_layer(traced, node)) is not None


def list_joined(node: fx.Node, dims: int = 4) -> list[fx.Node]:
    """List the nodes whose maps a node joins, one after the other; none if it does something else.

    Args:
        dims: of the maps: samples, channels and positions.
    """
    if node.op != "call_function" or get_operation_name(node) not in JOINS:
        return []
    arguments = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    tensors = arguments.get("tensors")
    if arguments.get("dim") not in (1, 1 - dims) or not isinstance(tensors, list | tuple):
        return []
    nodes = [x for x in tensors if isinstance(x, fx.Node)]
    return nodes if len(nodes) == len(tensors) else []


def keeps_zeros(traced: nn.Module, node: fx.Node) -> bool:
    """Tell whether maps of zeros are maps of zeros behind a node."""
    name = name_operation(traced, node)
    if name in BY_ARGUMENTS:
        return _makes_zeros_of_zeros(traced, node, name == "pad")
    return name in KEEPS_ZEROS or (name.endswith(".apply") and _keeps_each_map(node))


def crops_space(node: fx.Node, dims: int) -> bool:
    """Tell whether a node cuts a part out of each map, `x[:, :, 1:-1, 1:-1]`, and leaves all maps there.

    Args:
        dims: of the maps: samples, channels and positions.
    """
    if node.op == "call_method" and node.target == "narrow":
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(dim, int) and dim % dims > 1
    index = node.args[1] if node.op == "call_function" and node.target is operator.getitem else None
    if not isinstance(index, tuple) or not all(part is ... or isinstance(part, slice) for part in index):
        return False
    index = index if ... in index else (*index, ...)
    place, rest = index.index(...), [slice(None)] * (dims + 1 - len(index))
    parts = [*index[:place], *rest, *index[place + 1 :]]
    return parts[:2] == [slice(None)] * 2


def makes_constants(traced: nn.Module, node: fx.Node, maps: Collection[fx.Node]) -> bool:
    """Tell whether a node changes each entry of maps by itself, with parameters and numbers at most.

    Args:
        maps: the nodes whose maps may be zeros.
    """
    added = [source for source in node.all_input_nodes if source not in maps]
    is_constant = all(source.op == "get_attr" for source in added)
    return is_constant and name_operation(traced, node) in MAKES_CONSTANTS


def _keeps_each_map(node: fx.Node) -> bool:
    """Tell, of a function with a gradient of its own, whether each map of zeros stays one, by trying it."""
    arguments, function = node.args[1:], node.target
    if not callable(function) or any(isinstance(value, fx.Node) for value in tree_leaves(arguments)):
        return False
    on_KK = 1 - torch.eye(8)
    x_KKHW = on_KK[:, :, None, None] * torch.linspace(-9, 9, 6 * 6).view(6, 6)
    try:
        y_KKHW = function(x_KKHW, *arguments)
    except Exception:  # it is the model's own, and not made for such an input
        return False
    is_map = isinstance(y_KKHW, torch.Tensor) and y_KKHW.shape == x_KKHW.shape
    return is_map and not y_KKHW[on_KK == 0].any()


def _makes_zeros_of_zeros(traced: nn.Module, node: fx.Node, is_padding: bool) -> bool:
    """Compute what a node makes of zeros; it may take nothing else that is computed, but how far to pad."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    arguments, named = list(node.args[1:]), dict(node.kwargs)
    if is_padding:
        arguments[:1], named = [(1, 1, 1, 1)], {name: value for name, value in named.items() if name != "pad"}
    if any(isinstance(value, fx.Node) for value in tree_leaves((arguments, named))):
        return False
    zeros, layer = torch.zeros(1, 1, 64, 64), get_layer(traced, node)
    if layer is not None:
        output = layer(zeros)
    elif node.op == "call_method":
        output = getattr(zeros, str(node.target))(*arguments, **named)
    else:
        assert callable(node.target)
        output = node.target(zeros, *arguments, **named)
    return not output.any()
