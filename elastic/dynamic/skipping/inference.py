"""Prepare networks for inference: traced, their norms folded into convolutions."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from elastic.dynamic.calls import find_calls
from elastic.dynamic.norms import SetNorm
from elastic.errors import StructureError
from elastic.pruning.folding import fold_gates
from elastic.widths.hooks import has_hooks, keeps_value
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.mode import set_mode
from elastic.widths.tracing import BATCH_NORM, get_layer, trace
from elastic.widths.tracing.changing import find_written


def take_first(samples: Sequence[Example]) -> tuple[Tensor, ...]:
    """Take the inputs of the first sample, if there is one."""
    return list_inputs(samples[0]) if samples else ()


def prepare_for_inference(net: nn.Module, *example: Tensor) -> fx.GraphModule:
    """Trace a copy in evaluation mode, without the layers that do nothing there.

    Args:
        example: inputs; with them, a forward may ask for sizes.
    """
    copied = set_mode(fold_gates(net))
    inputs = [x.to("meta") for x in example]
    if isinstance(copied, fx.GraphModule):  # perhaps in both modes
        traced = fx.GraphModule(copied, copied.graph)
    else:
        traced = _trace(copied, *inputs)
    _refuse_written(traced, is_exact=bool(inputs))
    _leave_out_kept(traced)
    _fold_norms(traced)
    _leave_out_identities(traced)
    traced.recompile()
    return traced


def _trace(net: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    try:
        return trace(net, *inputs)
    except StructureError as error:
        if inputs:
            raise
        raise StructureError(
            f"{error}; or give a sample, by which a forward that asks for sizes is traced"
        ) from error


def _refuse_written(traced: fx.GraphModule, is_exact: bool) -> None:
    """Refuse a forward that changes a parameter: layers have copies of theirs here.

    Args:
        is_exact: the forward has run; else it is not told how it assigns, only that it looks for data.
    """
    for node in traced.graph.nodes:
        if not is_exact and node.target is getattr and node.args[1] == "data":
            raise StructureError(f"{node.args[0]}.data may be what the forward changes: a sample would tell")
        written = find_written(node, partial(get_layer, traced), traced.get_submodule)
        if written is not None:
            raise StructureError(
                f"{node.name} changes {written.target}, a parameter: let the forward compute with what it "
                "makes of it, or change it after each step of training"
            )


def _leave_out_kept(traced: fx.GraphModule) -> None:
    """Leave out that values are kept in modules: it would be those of the network that was copied."""
    for node in list(traced.graph.nodes):
        if keeps_value(node):
            traced.graph.erase_node(node)


def _fold_norms(traced: fx.GraphModule) -> None:
    """Fold each batch norm that alone reads a convolution into it, in place."""
    for node in list(traced.graph.nodes):
        norm = get_layer(traced, node)
        if not isinstance(norm, BATCH_NORM | SetNorm) or norm.running_mean is None or has_hooks(norm):
            continue
        (source,) = node.all_input_nodes
        conv, path = get_layer(traced, source), str(source.target)
        if not isinstance(conv, nn.modules.conv._ConvNd) or has_hooks(conv):
            continue
        if conv.transposed and conv.groups > 1:  # whose weight has no dimension for all of its kernels
            continue
        if len(source.users) == 1 and len(find_calls(traced, path)) == 1:
            owner, _, name = path.rpartition(".")
            folded = fuse_conv_bn_eval(conv, norm, conv.transposed)  # type: ignore[type-var, arg-type]  # SetNorm has what it reads
            setattr(traced.get_submodule(owner), name, folded)
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)


def _leave_out_identities(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        layer = get_layer(traced, node)
        if layer is None or has_hooks(layer):
            continue
        if isinstance(layer, nn.Identity | nn.Dropout | nn.Dropout2d):
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)


def cut_out(
    traced: fx.GraphModule, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], output: fx.node.Argument
) -> fx.GraphModule:
    """Make a network of its own of some nodes; the one that they are in keeps them, too.

    Args:
        inputs: nodes of which the result is given the values, in this order.
        output: of the nodes, what it returns.
    """
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(output, copies.__getitem__))
    return fx.GraphModule(traced, graph)


def delete_unused_layers(traced: fx.GraphModule) -> None:
    """Delete the layers that a graph neither calls nor hands on, in place.

    The method of torch.fx deletes the layers inside a module that is handed on, as to a function with a
    gradient of its own, which calls it.
    """
    nodes = [node for node in traced.graph.nodes if node.op in ("call_module", "get_attr")]
    used = {str(node.target) for node in nodes}
    around = {path for target in used for path in accumulate(target.split("."), "{}.{}".format)}
    for path in [path for path, _ in traced.named_modules() if path]:
        inside = accumulate(path.split("."), "{}.{}".format)
        if path not in around and used.isdisjoint(inside):
            traced.delete_submodule(path)
