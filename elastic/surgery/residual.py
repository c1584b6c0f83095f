"""Recognise a residual block y = act(f(x) + x), f ending in a norm with gain and shift, or in a scale."""

from torch import Tensor, fx, nn

from elastic.errors import StructureError
from elastic.surgery.layers import NORMS
from elastic.widths.mode import set_mode
from elastic.widths.operations.interface import PRODUCTS
from elastic.widths.parameters import (
    find_constraint,
    find_spectral_norm,
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
RESHAPES = {"view", "reshape", "unsqueeze", "getitem"}


def find_last_tensors(block: nn.Module) -> tuple[str, ...]:
    """Find the parameters that end f in a block y = act(f(x) + x): where they are zero, so is f.

    They are the gain and shift of a norm, or a scale (ConvNeXt, arXiv 2201.03545), by their paths; none for
    any other block. Dropout, stochastic depth and squeeze and excitation may come behind.
    """
    if _has_foreign(block) or not _contains_norm(block):
        return ()
    try:
        graph = trace(set_mode(make_meta_copy(block))).graph
    except StructureError:
        return ()
    inputs = graph.find_nodes(op="placeholder")
    sums = [n for n in graph.nodes if n.op != "call_module" and _get_name(n) in ADDITIONS]
    if len(inputs) != 1 or not sums or len(sums[-1].all_input_nodes) != 2:
        return ()
    first, second = (_skip_drops(node, block) for node in sums[-1].all_input_nodes)
    branch = first if second is inputs[0] else second if first is inputs[0] else None
    if branch is None or branch is inputs[0] or not _ends_idempotent(sums[-1], block):
        return ()
    return _find_factors(branch, block)


def _find_factors(node: fx.Node, block: nn.Module) -> tuple[str, ...]:
    """Find the parameters with which a node's output is zero: of a norm, or of one factor of a product."""
    node = _skip_drops(node, block)
    if _is_affine_norm(node, block):
        return f"{node.target}.weight", f"{node.target}.bias"
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


def _contains_norm(block: nn.Module) -> bool:
    """Tell whether a block has a norm inside: without one there is no need to trace it."""
    return any(isinstance(layer, NORMS) for layer in block.modules() if layer is not block)


def _has_foreign(block: nn.Module) -> bool:
    """Tell whether something other than gates and weight norm computes a tensor of the block."""
    for module in block.modules():
        name = get_weight_name(module)
        if find_spectral_norm(module, name) or find_constraint(module, name):
            return True  # which may not leave alone what weights a further block would start with
    return any(list_foreign(module, name) for module in block.modules() for name in list_chains(module))


def _skip_drops(node: fx.Node, block: nn.Module) -> fx.Node:
    """Go back past what does nothing, or drops something in training."""
    while isinstance(get_layer(block, node), DROPS) or _get_name(node) in DROP_CALLS:
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
