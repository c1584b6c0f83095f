"""Find the calls of layers in a traced network, and the batch norms behind them."""

from typing import TypeGuard

from torch import fx, nn

from elastic.errors import StructureError
from elastic.widths.operations.registry import find_base
from elastic.widths.parameters import get_kind
from elastic.widths.tracing import BATCH_NORM, get_layer, list_graphs

INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm


STOCK = {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}


def is_convolution(layer: nn.Module | None) -> TypeGuard[nn.modules.conv._ConvNd]:
    """Tell whether a layer is one of torch's convolutions, whose weight has a place for each kernel."""
    if layer is None or find_base(get_kind(layer)) not in STOCK:
        return False
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return layer.groups == 1 or not layer.transposed


def is_linear(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Tell whether a layer computes as torch's linear layer."""
    return layer is not None and find_base(get_kind(layer)) is nn.Linear


def find_calls(traced: fx.GraphModule, path: str) -> list[fx.Node]:
    """Find the nodes that call a layer in evaluation."""
    return list(traced.graph.find_nodes(op="call_module", target=path))


def find_norm(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Find the batch norm that alone reads a layer; without one it is the layer."""
    users = list(node.users)
    is_normed = len(users) == 1 and isinstance(get_layer(traced, users[0]), BATCH_NORM)
    return users[0] if is_normed else node


def require_one_call(traced: fx.GraphModule, path: str) -> str:
    """Return the path of a layer that is called once in each mode, with the same norm behind it.

    Raises:
        StructureError: it is not.
    """
    norms = set[fx.node.Target]()
    for graph in list_graphs(traced):
        calls = graph.find_nodes(op="call_module", target=path)
        if len(calls) != 1:
            mode = "" if graph is traced.graph else " in training"
            count = f"used {len(calls)} times" if calls else "never called as a layer"
            raise StructureError(f"{path} is {count}{mode}")
        norms.update(find_norm(traced, call).target for call in calls)
    if len(norms) > 1:
        raise StructureError(f"{path} has a norm right behind it in one mode alone")
    return path
