"""Recognise sums of two tensors in a traced network."""

import operator

import torch
from torch import fx

from elastic.dynamic.zeros import READS_SHAPE
from elastic.widths.tracing import get_operation_name

ADD = (operator.add, torch.add)


def find_addend(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """Find what else is added, where a node's user is the sum of two tensors."""
    adds = user.target in ADD or (user.target is operator.iadd and user.args[0] is node)
    if user.op == "call_function" and adds and len(user.args) == 2 and not user.kwargs:
        addends = [arg for arg in user.args if arg is not node]
        if len(addends) == 1 and isinstance(addends[0], fx.Node) and not is_number(addends[0]):
            return addends[0]
    return None


def is_number(node: fx.Node) -> bool:
    """Tell whether a node is a number, computed from a tensor's shape."""
    inputs = node.all_input_nodes
    computed = node.op == "call_function" and bool(inputs) and all(map(is_number, inputs))
    return computed or get_operation_name(node) in READS_SHAPE
