"""Recognise what stands around a convolution in a traced network: sums, ReLUs, poolings and heads."""

from collections.abc import Sequence
from operator import attrgetter

from torch import fx, nn
from torch.nn.modules.utils import _pair

from elastic.dynamic.calls import is_linear
from elastic.dynamic.zeros import name_operation, works_in_place
from elastic.widths.tracing import get_layer, get_operation_name

# Of each entry by itself.
FUNCTIONS = {
    *"relu relu6 leaky_relu elu selu celu gelu silu mish tanh hardswish softsign".split(),
    *"sigmoid hardsigmoid softplus logsigmoid exp square pow mul add sub rsub".split(),
}


def find_next(traced: nn.Module, chain: Sequence[fx.Node]) -> fx.Node | None:
    """Find what alone reads the end of a chain, if all of the chain may be carried out as late as that."""
    if len(chain[-1].users) != 1:
        return None
    (user,) = chain[-1].users
    between = chain[0].next
    while between is not user:
        if between not in chain and works_in_place(traced, between):
            return None  # it might change what the chain reads
        between = between.next
    return user


def find_pool_size(pool: nn.MaxPool2d) -> tuple[int, int, int, bool] | None:
    """Find size, stride, padding and whether it rounds up, of a pooling that is square, without dilation."""
    options = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    values = [set(_pair(value)) for value in options]
    if any(len(value) > 1 for value in values) or pool.return_indices:
        return None
    size, stride, padding, dilation = (value.pop() for value in values)
    return (size, stride, padding, pool.ceil_mode) if dilation == 1 and 2 * padding <= size else None


def find_head(traced: nn.Module, linear: fx.Node) -> tuple[list[fx.Node], bool]:
    """Find what lies between maps and a linear layer, it included, and whether maps are averaged there.

    The chain is empty where maps are not flattened.
    """
    nodes = linear.all_input_nodes
    if len(nodes) != 1 or not _flattens_maps(traced, nodes[0]):
        return [], False
    chain = [*nodes, linear]
    before = nodes[0].all_input_nodes[0]
    if pools := _averages_maps(traced, before):
        chain = [before, *chain]
    is_chain = all(find_next(traced, chain[:i]) is node for i, node in enumerate(chain) if i)
    return (chain, pools) if is_chain else ([], False)


def find_expansion(traced: nn.Module, linear: fx.Node) -> list[fx.Node]:
    """Find a product behind a linear layer, functions of each entry and the next linear layer, they included.

    The functions may take what the product does, too, and parameters of one entry. The chain is empty where
    something else is between them, or reads what is.
    """
    chain = [linear]
    while (user := find_next(traced, chain)) is not None:
        is_last, is_product = is_linear(get_layer(traced, user)), len(chain) == 1
        factors = chain[1].all_input_nodes if len(chain) > 1 else []
        others = [node for node in user.all_input_nodes if node not in (chain[-1], *factors)]
        is_function = name_operation(traced, user) in FUNCTIONS and all(_is_single(traced, x) for x in others)
        if not (is_last or is_product or is_function):
            break
        chain.append(user)
        if is_last:
            return chain if len(chain) > 2 else []
    return []


def _is_single(traced: nn.Module, node: fx.Node) -> bool:
    """Tell whether a node is a parameter or buffer of one entry."""
    if node.op != "get_attr":
        return False
    value = attrgetter(str(node.target))(traced)
    return value.numel() == 1 and value.dim() < 2  # type: ignore[no-any-return]


def _flattens_maps(traced: nn.Module, node: fx.Node) -> bool:
    """Tell whether a node flattens all but the batch."""
    layer = get_layer(traced, node)
    if layer is not None:
        return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)
    is_function = node.op in ("call_function", "call_method") and get_operation_name(node) == "flatten"
    return is_function and node.args[1:] in ((1,), (1, -1)) and not node.kwargs


def _averages_maps(traced: nn.Module, node: fx.Node) -> bool:
    layer = get_layer(traced, node)
    return type(layer) is nn.AdaptiveAvgPool2d and set(_pair(layer.output_size)) == {1}
