"""Find the batch norm that follows a layer."""

from collections import defaultdict

from torch import Tensor, fx, nn

from elastic.widths.mode import set_mode
from elastic.widths.tracing.graph import get_layer, trace
from elastic.widths.tracing.meta import BATCH_NORM, make_meta_copy


def find_following_norms(model: nn.Module, *example: Tensor) -> dict[str, str]:
    """Find, for each layer that one batch norm and nothing else reads, that norm's path."""
    inputs = [x.to("meta") for x in example]
    traced = trace(set_mode(make_meta_copy(model)), *inputs)
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in traced.graph.find_nodes(op="call_module"):
        calls[str(node.target)].append(node)
    norms = {}
    for path, nodes in calls.items():
        readers = [reader for node in nodes for reader in node.users]
        if len(nodes) == len(readers) == 1 and isinstance(get_layer(traced, readers[0]), BATCH_NORM):
            norm = str(readers[0].target)
            if len(calls[norm]) == 1:
                norms[path] = norm
    return norms


def drop_counters(traced: fx.GraphModule) -> None:
    """Leave out that norms count batches in training, which no momentum of theirs needs."""
    for node in traced.graph.find_nodes(op="get_attr"):
        is_counter, users = str(node.target).endswith("num_batches_tracked"), list(node.users)
        if is_counter and all(user.target == "add_" and not user.users for user in users):
            for unused in (*users, node):
                traced.graph.erase_node(unused)
    traced.recompile()
