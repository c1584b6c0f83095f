"""Networks as inference needs them: traced, their norms folded into convolutions."""

import copy

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from elastic.dynamic.modules import SetNorm
from elastic.widths.tracing import BATCH_NORM, get_layer, trace


def prepare_for_inference(net: nn.Module) -> fx.GraphModule:
    """A traced copy in evaluation mode, without the layers that do nothing there."""
    copied = copy.deepcopy(net).eval()
    traced = copied if isinstance(copied, fx.GraphModule) else trace(copied)
    _fold_norms(traced)
    _leave_out_identities(traced)
    traced.recompile()
    return traced


def _fold_norms(traced: fx.GraphModule) -> None:
    """Fold each batch norm that alone reads a convolution into it, in place."""
    layers = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        norm = layers.get(str(node.target)) if node.op == "call_module" else None
        before = node.args[0] if isinstance(norm, BATCH_NORM | SetNorm) else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv = layers.get(str(before.target))
        calls = [n for n in traced.graph.nodes if n.op == "call_module" and n.target == before.target]
        if isinstance(conv, nn.Conv2d) and len(calls) == 1 and norm.running_mean is not None:  # type: ignore[union-attr]
            owner, _, name = str(before.target).rpartition(".")
            setattr(traced.get_submodule(owner), name, fuse_conv_bn_eval(conv, norm))  # type: ignore[arg-type]
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)


def _leave_out_identities(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        layer = get_layer(traced, node)
        if isinstance(layer, nn.Identity | nn.Dropout | nn.Dropout2d):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
