"""Recognise a residual block y = act(f(x) + x), f ending in a norm with gain and shift."""

from torch import fx, nn

from elastic.errors import StructureError
from elastic.surgery.layers import NORMS
from elastic.widths.parameters import get_original, list_chains, list_foreign
from elastic.widths.tracing import get_layer, get_operation_name, make_meta_copy, trace

ADDITIONS = {"add", "iadd"}
# What leaves its own output as it is.
IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Identity)
IDEMPOTENT_CALLS = {"relu", "relu6", "output"}


def find_last_norm(block: nn.Module) -> str | None:
    """Find the path of the norm that ends f in a block y = act(f(x) + x); None for any other block."""
    if _has_foreign(block) or not _contains_norm(block):
        return None
    try:
        graph = trace(make_meta_copy(block)).graph
    except StructureError:
        return None
    inputs = graph.find_nodes(op="placeholder")
    sums = [n for n in graph.nodes if n.op != "call_module" and _get_name(n) in ADDITIONS]
    if len(inputs) != 1 or not sums:
        return None
    branches = [_skip_identities(node, block) for node in sums[-1].all_input_nodes]
    norms = [node for node in branches if node is not inputs[0] and _is_affine_norm(node, block)]
    if len(branches) != 2 or len(norms) != 1 or inputs[0] not in branches:
        return None
    return str(norms[0].target) if _ends_idempotent(sums[-1], block) else None


def _contains_norm(block: nn.Module) -> bool:
    """Tell whether a block has a norm inside: without one there is no need to trace it."""
    return any(isinstance(layer, NORMS) for layer in block.modules() if layer is not block)


def _has_foreign(block: nn.Module) -> bool:
    """Tell whether something other than gates and weight norm computes a tensor of the block."""
    return any(list_foreign(module, name) for module in block.modules() for name in list_chains(module))


def _skip_identities(node: fx.Node, block: nn.Module) -> fx.Node:
    """Go back past modules that do nothing."""
    while isinstance(get_layer(block, node), nn.Identity):
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
