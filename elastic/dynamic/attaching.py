"""Attach kernel activation modules to any CNN, where maps that are off need not be read."""

from collections.abc import Iterable
from itertools import chain
from typing import cast

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.activations import Activation
from elastic.dynamic.calls import INSTANCE_NORM, find_calls, find_norm, is_convolution, is_linear
from elastic.dynamic.following import follow_maps
from elastic.dynamic.maps import gate_resized
from elastic.dynamic.modules import KINDS, KernelActivation
from elastic.dynamic.norms import SetNorm
from elastic.dynamic.sites import Site, count_reading_groups, find_sites
from elastic.errors import OptionError, StructureError
from elastic.widths.matching import require_widths
from elastic.widths.tracing import BATCH_NORM, get_layer, list_graphs, trace_both_modes
from elastic.widths.width import Widths

MODULES = "kams"  # where a network holds them; a name in files


def attach_modules(
    net: nn.Module,
    widths: Widths,
    names: Iterable[str] | None = None,
    sets: int = 1,
    activation: Activation = "ramp",
    kind: str = "input",
    branches: bool = False,
) -> fx.GraphModule:
    """Attach a kernel activation module for each width; the network's layers are shared, under their names.

    Args:
        names: the widths whose kernels are switched; by default all that can be.
        sets: how many sets of modules there are, see `select_set`.
        activation: what gates are, see `KernelActivation`.
        kind: what the modules look at: the "input", or as controls nothing ("constant", "random").
        branches: whether kernels that end a branch are switched, too: their maps are left out of the sum.

    Raises:
        StructureError: the kernels of a width that is named cannot be switched off, or of none can, or the
            network has modules.
        OptionError: a kind, an activation or a number of sets that cannot be.
    """
    require_widths(net, widths)
    if kind not in KINDS:
        raise OptionError(f"modules cannot look at '{kind}': set kind to {', '.join(KINDS)}")
    if hasattr(net, MODULES):
        raise StructureError(
            f"{type(net).__name__} has '{MODULES}' already: attach modules to the network that it is made of"
        )
    traced = trace_both_modes(net, *widths.example)
    sites = find_sites(traced, widths, names, branches)
    modules = nn.ModuleDict()
    traced.add_submodule(MODULES, modules)
    for site in sites:
        _attach(traced, site, KINDS[kind], sets, activation)
    if sets > 1:
        _attach_norms(traced, modules, sets)
    for graph in list_graphs(traced):
        graph.lint()
    traced.recompile()
    return traced


def _attach(
    traced: fx.GraphModule, site: Site, make: type[KernelActivation], sets: int, activation: Activation
) -> None:
    layer = traced.get_submodule(site.writer)
    if is_linear(layer):
        reads, kernels = layer.in_features, layer.out_features
    else:
        assert is_convolution(layer)
        reads, kernels = layer.in_channels, layer.out_channels
    module = make(site, reads, kernels, sets, activation)
    module.order_scores(_measure_worth(traced, site, kernels))
    path = f"{MODULES}.{site.writer.replace('.', '/')}"
    traced.add_submodule(path, module.to(layer.weight))
    for graph in list_graphs(traced):
        _insert(traced, graph, site, path)


@torch.no_grad()
def _measure_worth(traced: fx.GraphModule, site: Site, kernels: int) -> Tensor:
    """Measure what each kernel's map moves in its readers: their weights for it, times its norms' gains."""
    worth_K = measure_reading_weights(traced, site, kernels)
    (call,) = find_calls(traced, site.writer)
    behind = (str(find_norm(traced, call).target), *site.followers)
    for layer in map(traced.get_submodule, behind):
        gain_C = layer._parameters.get("weight")
        if gain_C is not None and gain_C.dim() == 1:  # a norm's
            worth_K = worth_K * gain_C.square().unflatten(0, (kernels, -1)).mean(1)
    return worth_K


def measure_reading_weights(traced: fx.GraphModule, site: Site, kernels: int) -> Tensor:
    """Sum the squares of the weights that read each kernel's map; 1 if none do."""
    weight = cast(Tensor, traced.get_submodule(site.writer).weight)
    worth_K = weight.new_zeros(kernels) if site.readers else weight.new_ones(kernels)
    for reader in site.readers:
        read = list_reading_weights(traced.get_submodule(reader.path))[reader.begin : reader.end]
        worth_K = worth_K + read.unflatten(0, (kernels, -1)).flatten(1).square().sum(1)
    return worth_K


def list_reading_weights(layer: nn.Module) -> Tensor:
    """List a layer's weights by the channel that they read: (channels, all others)."""
    weight = cast(Tensor, layer.weight)
    if getattr(layer, "transposed", False):
        return weight.flatten(1)
    return weight.unflatten(0, (count_reading_groups(layer), -1)).transpose(1, 2).flatten(0, 1).flatten(1)


def _attach_norms(traced: fx.GraphModule, modules: nn.ModuleDict, sets: int) -> None:
    """Keep statistics of norms for each set of modules, wherever statistics are kept."""
    for node in chain.from_iterable(graph.nodes for graph in list_graphs(traced)):
        norm, name = get_layer(traced, node), str(node.target).replace(".", "/")
        if isinstance(norm, BATCH_NORM | INSTANCE_NORM) and norm.running_mean is not None:
            if name not in modules:  # it may be called more than once
                modules[name] = SetNorm(norm, sets)
            node.target = f"{MODULES}.{name}"


def _insert(traced: fx.GraphModule, graph: fx.Graph, site: Site, path: str) -> None:
    """Compute gates before the layer, and multiply by them the maps behind it, and wherever they are made."""
    (writer,) = graph.find_nodes(op="call_module", target=site.writer)
    followed = follow_maps(traced, writer, site.axis)
    with graph.inserting_before(writer):
        gate = graph.call_module(path, (writer.args[0],))
    for end in followed.ends:
        _, is_resized, is_nonzero = followed.maps[end]
        with graph.inserting_after(end):
            gated = graph.call_function(gate_resized if is_resized else torch.mul, (end, gate))
        for user in [user for user in end.users if user is not gated]:
            is_gated_later = is_nonzero and user in followed.maps and followed.maps[user].nonzero
            if not is_gated_later:
                user.replace_input_with(end, gated)
