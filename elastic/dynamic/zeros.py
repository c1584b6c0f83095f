"""Tell which operations keep zeros: maps that are off stay off on their way to what reads them."""

from torch import fx, nn

from elastic.widths.tracing import get_layer, get_operation_name

PRODUCTS = ("mul", "imul", "multiply")  # zero where either factor is
# Each function, or method, that makes zeros of zeros, and the layer that does the same. Torch's poolings that
# can return indices, too, are `boolean_dispatch` to torch.fx.
KEEPS_ZEROS: dict[str, type[nn.Module] | None] = {
    **{"relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "selu": nn.SELU},
    **{"celu": nn.CELU, "gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish, "tanh": nn.Tanh},
    **{"hardswish": nn.Hardswish, "dropout": nn.Dropout, "dropout2d": nn.Dropout2d},
    **{"max_pool2d": nn.MaxPool2d, "avg_pool2d": nn.AvgPool2d, "boolean_dispatch": None, "mean": None},
    **{"adaptive_avg_pool2d": nn.AdaptiveAvgPool2d, "adaptive_max_pool2d": nn.AdaptiveMaxPool2d},
    **{"flatten": nn.Flatten, "view": None, "reshape": None, "contiguous": None},
    **{"identity": nn.Identity, "zero_pad2d": nn.ZeroPad2d},
    **dict.fromkeys(PRODUCTS),
}
RESHAPES = {"flatten", "view", "reshape"}  # of those, the ones behind which channels lie elsewhere
READS_SHAPE = {"size", "getattr", "dim"}
NAMES = {layer: name for name, layer in KEEPS_ZEROS.items() if layer is not None}


def name_operation(traced: nn.Module, node: fx.Node) -> str:
    """Name what a node does, as `KEEPS_ZEROS` does, whether a layer does it, a function or a method."""
    layer = get_layer(traced, node)
    if layer is not None:
        return NAMES.get(type(layer), "")
    return get_operation_name(node).strip("_") if node.op in ("call_function", "call_method") else ""


def keeps_zeros(traced: nn.Module, node: fx.Node) -> bool:
    """Tell whether maps of zeros are maps of zeros behind a node."""
    return name_operation(traced, node) in KEEPS_ZEROS
