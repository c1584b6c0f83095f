"""Recognise a residual block: y = act(f(x) + x), or y = z + g(z) of z = x + f(x), and so on.

Each branch ends in a norm with gain and shift, in a scale, or in a convolution or linear layer.
"""

from collections.abc import Collection
from typing import cast

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from elastic.errors import StructureError
from elastic.surgery.layers import NORMS
from elastic.widths.mode import set_mode
from elastic.widths.operations.interface import PRODUCTS
from elastic.widths.parameters import (
    find_constraint,
    find_spectral_norm,
    get_kind,
    get_original,
    get_weight_name,
    list_chains,
    list_foreign,
)
from elastic.widths.tracing import get_layer, get_operation_name, make_meta_copy, trace

ADDITIONS = {"add", "iadd"}
# What leaves its own output as it is.
IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Identity)
IDEMPOTENT_CALLS = {"relu", "relu6", "output"}
# What gives zeros for zeros, and passes their gradient on.
DROPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DROP_CALLS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "stochastic_depth"}
PASSING = (
    *(nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Tanh, nn.Softsign),
)
PASSING_CALLS = {"leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "tanh", "softsign"}
RESHAPES = {"view", "reshape", "unsqueeze", "getitem"}
LINEAR = (_ConvNd, nn.Linear)


def find_last_tensors(block: nn.Module) -> tuple[str, ...]:
    """Find the parameters that end the branches of a residual block: where they are zero, it is act(x).

    They are the gain and shift of a norm, a scale (ConvNeXt, arXiv 2201.03545), or the weight and bias of a
    layer (the last of a block that begins with its norm, arXiv 1603.05027), by their paths; none for any
    other block. Dropout, stochastic depth and squeeze and excitation may come behind.
    """
    if _has_foreign(block) or not _contains_layers(block):
        return ()
    try:
        graph = trace(set_mode(make_meta_copy(block))).graph
    except StructureError:
        return ()
    inputs = graph.find_nodes(op="placeholder")
    sums = [n for n in graph.nodes if n.op != "call_module" and _get_name(n) in ADDITIONS]
    if len(inputs) != 1 or not sums or not _ends_idempotent(sums[-1], block):
        return ()
    return _find_branches(sums[-1], inputs[0], block)


def _find_branches(node: fx.Node, start: fx.Node, block: nn.Module) -> tuple[str, ...]:
    """Find the parameters with which a sum is what the block is given; none where it never is."""
    if _get_name(node) not in ADDITIONS or node.op == "call_module" or len(node.all_input_nodes) != 2:
        return ()
    first, second = (_skip(node, block, (nn.Identity,)) for node in node.all_input_nodes)
    for carried, branch in ((first, second), (second, first)):
        if tensors := _find_factors(branch, block):
            if carried is start:
                return tensors
            if (before := _find_branches(carried, start, block)) and not _holds_blocks(block):
                return before + tensors
    return ()


def is_sequence(module: nn.Module) -> bool:
    """Tell whether a module holds others in their order, and does nothing of its own."""
    is_sequential = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return (is_sequential or isinstance(module, nn.ModuleList)) and len(module._modules) > 0


def get_last_child(sequence: nn.Module) -> nn.Module:
    """Get the last module of a sequence; it may stand in it more than once."""
    return cast(nn.Module, list(sequence._modules.values())[-1])


def _holds_blocks(block: nn.Module) -> bool:
    """Tell whether what looks like a block with several branches is a sequence of blocks, or holds one."""
    sequences = (module for module in block.modules() if is_sequence(module))
    return any(find_last_tensors(get_last_child(sequence)) for sequence in sequences)


def _find_factors(node: fx.Node, block: nn.Module) -> tuple[str, ...]:
    """Find the parameters with which a node's output is zero: of a layer, or of one factor of a product."""
    node = _skip(node, block, (*DROPS, *PASSING), DROP_CALLS | PASSING_CALLS)
    if _is_affine_norm(node, block):
        return f"{node.target}.weight", f"{node.target}.bias"
    if (layer := get_layer(block, node)) is not None and _is_linear(layer):
        names = ("weight", "bias") if layer.bias is not None else ("weight",)
        return tuple(f"{node.target}.{name}" for name in names)
    for factor in node.all_input_nodes if _get_name(node) in PRODUCTS else ():
        if tensors := _find_parameter(factor, block) or _find_factors(factor, block):
            return tensors
    return ()


def _find_parameter(node: fx.Node, block: nn.Module) -> tuple[str, ...]:
    """Find the parameter that a node gives, in whatever shape."""
    while node.op != "get_attr" and _get_name(node) in RESHAPES:
        node = node.all_input_nodes[0]
    if node.op != "get_attr":
        return ()
    path, _, name = str(node.target).rpartition(".")
    value: Tensor | None = block.get_submodule(path)._parameters.get(name)
    return () if value is None else (str(node.target),)


def _is_linear(layer: nn.Module) -> bool:
    """Tell whether a layer gives zeros where its weight and bias are zero, as torch's own do."""
    return isinstance(layer, LINEAR) and get_kind(layer).__module__.startswith("torch.nn.modules.")


def _contains_layers(block: nn.Module) -> bool:
    """Tell whether a block has a norm or a weight inside: without one there is no need to trace it."""
    return any(isinstance(layer, (*NORMS, *LINEAR)) for layer in block.modules() if layer is not block)


def _has_foreign(block: nn.Module) -> bool:
    """Tell whether something other than gates and weight norm computes a tensor of the block."""
    for module in block.modules():
        name = get_weight_name(module)
        if find_spectral_norm(module, name) or find_constraint(module, name):
            return True  # which may not leave alone what weights a further block would start with
    return any(list_foreign(module, name) for module in block.modules() for name in list_chains(module))


def _skip(
    node: fx.Node, block: nn.Module, layers: tuple[type[nn.Module], ...], calls: Collection[str] = ()
) -> fx.Node:
    """Go back past layers of some kinds, and some operations."""
    while isinstance(get_layer(block, node), layers) or _get_name(node) in calls:
        node = node.all_input_nodes[0]
    return node


def _is_affine_norm(node: fx.Node, block: nn.Module) -> bool:
    layer = get_layer(block, node)
    tensors = ("weight", "bias")
    return isinstance(layer, NORMS) and all(get_original(layer, tensor) is not None for tensor in tensors)


def _ends_idempotent(node: fx.Node, block: nn.Module) -> bool:
    """Tell whether all that follows a node leaves its own output as it is."""
    for reader in node.users:
        layer = get_layer(block, reader)
        is_idempotent = isinstance(layer, IDEMPOTENT) if layer else _get_name(reader) in IDEMPOTENT_CALLS
        if not is_idempotent or not _ends_idempotent(reader, block):
            return False
    return True


def _get_name(node: fx.Node) -> str:
    return get_operation_name(node).strip("_")
