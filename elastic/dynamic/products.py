"""Tell what is multiplied by maps that are off, and so is off with them: `x * torch.sigmoid(x)`."""

from collections.abc import Collection

from torch import fx

from elastic.dynamic.zeros import name_operation, works_in_place
from elastic.widths.operations.interface import PRODUCTS

MAKES_ANEW = {"add", "sub", "mul", "div", "truediv", "neg", "exp", "sigmoid", "tanh", "softplus"}


def ends_in_products(traced: fx.GraphModule, node: fx.Node, zeros: Collection[fx.Node]) -> bool:
    """Tell whether all that is made of a node is multiplied by maps that are off.

    Args:
        zeros: the nodes whose maps are.
    """
    results, anew = {node}, set[fx.Node]()  # what shares no memory with the maps may be changed in place
    for user in node.graph.nodes:
        is_product = user in zeros and name_operation(traced, user) in PRODUCTS
        if user is not node and (is_product or results.isdisjoint(user.all_input_nodes)):
            continue
        first = user.all_input_nodes[0]
        if user.op == "output" or (works_in_place(traced, user) and first not in anew):
            return False
        results.add(user)
        if first in anew or name_operation(traced, user) in MAKES_ANEW:
            anew.add(user)
    return True
