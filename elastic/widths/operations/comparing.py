"""Follow channels through losses, distances and similarities, which a forward may compute itself."""

import torch
from torch import fx, nn

from elastic.widths.operations.interface import (
    Axes,
    Tracker,
    get_argument,
    get_operation_name,
    get_shape,
    list_tensors,
)
from elastic.widths.operations.joining import broadcast_to
from elastic.widths.operations.shapes import reduce_over


def compare(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow what compares tensors entry by entry: they agree, and all that it takes together is mixed."""
    shape = torch.broadcast_shapes(*map(get_shape, list_tensors(node)))
    x = broadcast_to(tracker, node, shape)
    return x if get_shape(node) == shape else reduce_over(tracker, node, x, _find_dim(tracker, node))


def _find_dim(tracker: Tracker, node: fx.Node) -> int | None:
    """Find the dimension that vectors lie on, which are compared; None where all entries are."""
    layer = tracker.get_layer(node, nn.Module) if node.op == "call_module" else None
    if isinstance(layer, nn.PairwiseDistance) or get_operation_name(node) == "pairwise_distance":
        return -1
    if isinstance(layer, nn.CosineSimilarity):
        return layer.dim
    if get_operation_name(node) == "cosine_similarity":
        dim: int = get_argument(node, 2, "dim", default=1)
        return dim
    return None
