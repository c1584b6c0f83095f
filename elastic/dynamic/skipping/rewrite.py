"""Rewrite a network so that its layers are told, one by one, which channels of what they read are active.

Convolutions take the addition and the ReLU behind them.
"""

from collections.abc import Sequence
from functools import singledispatchmethod

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.calls import is_linear
from elastic.dynamic.maps import gate_resized, repeat_for_resized
from elastic.dynamic.modules import KernelActivation, iterate_modules
from elastic.dynamic.skipping.active import Active, ActiveLayer
from elastic.dynamic.skipping.convolution import ActiveConv2d, Method, list_methods
from elastic.dynamic.skipping.expansion import ActiveExpansion
from elastic.dynamic.skipping.gathering import GatheringConv
from elastic.dynamic.skipping.head import ActiveHead
from elastic.dynamic.skipping.inference import (
    cut_out,
    delete_unused_layers,
    prepare_for_inference,
    take_first,
)
from elastic.dynamic.skipping.layers import ActiveMaxPool2d, ActiveModule
from elastic.dynamic.skipping.patterns import find_expansion, find_head, find_next, find_pool_size
from elastic.dynamic.sums import find_addend
from elastic.dynamic.zeros import RESHAPES, keeps_zeros, list_joined, name_operation
from elastic.errors import OptionError, StructureError
from elastic.widths.hooks import has_hooks
from elastic.widths.inputs import Example
from elastic.widths.operations.interface import PRODUCTS
from elastic.widths.tracing import get_layer

Chain = list[fx.Node]  # of which each alone reads the one before


def scale(x: Tensor, active: Active, axis: int) -> Tensor:
    """Multiply maps by their gates."""
    return active.scale(x, axis)


def scale_resized(x: Tensor, active: Active) -> Tensor:
    """Multiply by their gates maps that have other dimensions than when they were computed."""
    return active._replace(gate_BK=repeat_for_resized(active.gate_BK, x)).scale(x)


def join(maps: Sequence[Tensor], actives: Sequence[Active | None]) -> Active:
    """List the active channels of maps that are joined, of which all are where there is no list."""
    gates = [x.new_ones(x.shape[:2]) for x in maps]
    pairs = zip(gates, actives, strict=True)
    return Active.from_gates(torch.cat([gate if a is None else a.gate_BK for gate, a in pairs], 1))


def rewrite(net: nn.Module, method: Method | None = None, samples: Sequence[Example] = ()) -> fx.GraphModule:
    """Rewrite a network, whose layers are told which channels are active.

    Args:
        method: of all convolutions; by default the kernel, or stock torch where that cannot be compiled.
        samples: inputs; with one, a forward may ask for sizes.

    Raises:
        StructureError: it is not in fp32 on the CPU, or it only contains a network with modules.
        OptionError: there is no such method on this machine.
    """
    _check(net)
    methods = list_methods()
    if method is not None and method not in methods:
        reason = ": it needs a C++ compiler that works" if method == "kernel" else ""
        raise OptionError(
            f"method='{method}' cannot be here{reason}: leave it out, or choose {', '.join(methods)}"
        )
    return _Rewriter(prepare_for_inference(net, *take_first(samples)), method or methods[0]).run()


def _check(net: nn.Module) -> None:
    if any(iterate_modules(net)) and not isinstance(net, fx.GraphModule):
        raise StructureError(
            f"{type(net).__name__} only contains a network with kernel activation modules: give that itself"
        )
    for parameter in net.parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise StructureError(
                f"kernels are skipped in fp32 on the CPU, not in {parameter.dtype} on {parameter.device}: "
                "convert the network with .float().cpu()"
            )


class _Rewriter:
    """Replace what a traced network calls by layers that know which channels are active.

    Attributes:
        active: of each node whose maps are known not to be all active, the node that lists those that are.
        erased: nodes that are no longer there, as a convolution has taken them.
    """

    def __init__(self, traced: fx.GraphModule, method: Method) -> None:
        self.traced, self.graph, self.method = traced, traced.graph, method
        self.active: dict[fx.Node, fx.Node] = {}
        self.erased: set[fx.Node] = set()
        self.count = 0

    def run(self) -> fx.GraphModule:
        for node in list(self.graph.nodes):
            if node not in self.erased and not self._has_hooks(node):
                self._rewrite(get_layer(self.traced, node), node)
        self._leave_unread_maps()
        delete_unused_layers(self.traced)
        self.graph.lint()
        self.traced.recompile()
        return self.traced

    @singledispatchmethod
    def _rewrite(self, layer: nn.Module | None, node: fx.Node) -> None:
        """Rewrite a node by the kind of its layer; this is for all others, and for functions."""
        if (gates := self._get_gates(node)) is not None:
            axis = self._get_axis(gates)
            node.target, node.args = scale, (*node.args, axis)
            self._list_active(node, gates if axis == 1 else None)
        elif node.target is gate_resized:
            node.target = scale_resized
        elif keeps_zeros(self.traced, node) and name_operation(self.traced, node) not in RESHAPES:
            self._list_active(node, self._get_active(node))
        elif joined := list_joined(node):
            self._join_active(node, joined)

    @_rewrite.register
    def _(self, layer: KernelActivation, node: fx.Node) -> None:
        reads_images = isinstance(self.traced.get_submodule(layer.site.writer), nn.Conv2d)
        self._replace([node], ActiveModule(layer, reads_images), (node.args[0], self._get_active(node)))

    @_rewrite.register
    def _(self, layer: nn.MaxPool2d, node: fx.Node) -> None:
        active, sizes = self._get_active(node), find_pool_size(layer)
        if sizes is not None and node.args:
            node = self._replace([node], ActiveMaxPool2d(*sizes), (node.args[0], active))
        self._list_active(node, active)

    @_rewrite.register
    def _(self, layer: nn.modules.conv._ConvNd, node: fx.Node) -> None:
        """Take what follows a convolution into it: its gates, else a sum; and a ReLU behind either.

        Gates stand at once behind a convolution, whose norm has been folded into it. Maps that are summed
        have none: a width that several layers write is not switched.
        """
        if not node.args:
            return
        chain, gates, residual = [node], None, None
        user = find_next(self.traced, chain)
        if user is not None:
            gates = self._get_gates(user) if user.args[:1] == (node,) else None
            residual = find_addend(user, node) if gates is None else None
            chain = [*chain, user] if gates or residual else chain
        if not ActiveConv2d.takes(layer):
            self._gather(layer, chain[:2] if gates else [node], gates)
            return
        relu = self._find_relu(chain)
        chain = chain if relu is None else [*chain, relu]
        conv = ActiveConv2d(layer, relu is not None, method=self.method)
        call = self._replace(chain, conv, (node.args[0], self._get_active(node), gates, residual))
        self._list_active(call, gates)

    def _gather(self, layer: nn.modules.conv._ConvNd, chain: Chain, gates: fx.Node | None) -> None:
        """Let a convolution that the kernel does not take gather weights, if not all channels are active."""
        reads = self._get_active(chain[0])
        if self.method != "dense" and GatheringConv.takes(layer) and (reads or gates):
            call = self._replace(chain, GatheringConv(layer), (chain[0].args[0], reads, gates))
            self._list_active(call, gates)

    @_rewrite.register
    def _(self, layer: nn.Linear, node: fx.Node) -> None:
        chain, pools = find_head(self.traced, node)
        if chain and ActiveHead.takes(layer) and not any(map(self._has_hooks, chain)):
            self._replace(chain, ActiveHead(layer, pools), (chain[0].all_input_nodes[0],))
        elif self.method != "dense" and (chain := find_expansion(self.traced, node)):
            self._expand(layer, chain)

    def _expand(self, layer: nn.Linear, chain: Chain) -> None:
        """Take the gates behind a linear layer, and all up to the next one, into one layer."""
        first, gated, *between, last = chain
        gates, projection = self._get_gates(gated), get_layer(self.traced, last)
        if gates is not None and first.args and not any(map(self._has_hooks, chain)):
            assert is_linear(projection)
            inputs = dict.fromkeys(node for user in between for node in user.all_input_nodes)
            nodes = [*(node for node in inputs if node.op == "get_attr"), *between]
            function = cut_out(self.traced, nodes, [gated, gates], [gated, *between][-1])
            expansion = ActiveExpansion(layer, function, projection)
            self._replace(chain, expansion, (first.args[0], None, gates))

    def _find_relu(self, chain: Chain) -> fx.Node | None:
        """Find the ReLU that alone reads the end of a chain; one with hooks is left where it is."""
        user = find_next(self.traced, chain)
        if user is None or name_operation(self.traced, user) != "relu" or self._has_hooks(user):
            return None
        return user

    def _has_hooks(self, node: fx.Node) -> bool:
        """Tell whether a node calls a layer of the network with hooks, which only it can run."""
        layer = get_layer(self.traced, node)
        return layer is not None and not isinstance(layer, KernelActivation) and has_hooks(layer)

    def _get_active(self, node: fx.Node) -> fx.Node | None:
        """Get the node that lists the active channels of what a node reads, if any is known not to be."""
        is_product = name_operation(self.traced, node) in PRODUCTS
        sources = node.args if is_product else node.args[:1]
        return next((self.active[s] for s in sources if isinstance(s, fx.Node) and s in self.active), None)

    def _list_active(self, node: fx.Node, active: fx.Node | None) -> None:
        if active is not None:
            self.active[node] = active

    def _join_active(self, node: fx.Node, joined: Sequence[fx.Node]) -> None:
        """List the active channels behind a node that joins maps, if not all are known to be."""
        actives = [self.active.get(source) for source in joined]
        if any(actives):
            with self.graph.inserting_after(node):
                self.active[node] = self.graph.call_function(join, (joined, actives))

    def _get_axis(self, gates: fx.Node) -> int:
        """Get the axis of the channels that a module gates."""
        layer = get_layer(self.traced, gates)
        assert isinstance(layer, ActiveModule)
        return layer.module.site.axis

    def _get_gates(self, node: fx.Node) -> fx.Node | None:
        """Get the gates that a node multiplies maps by, if that is what it does."""
        gates = node.args[1] if node.target is torch.mul and len(node.args) == 2 else None
        if isinstance(gates, fx.Node) and isinstance(get_layer(self.traced, gates), ActiveModule):
            return gates
        return None

    def _replace(self, chain: Chain, layer: ActiveLayer, args: tuple[fx.node.Argument, ...]) -> fx.Node:
        """Call a layer in the place of a chain."""
        name, self.count = f"active{self.count}", self.count + 1
        self.traced.add_submodule(name, layer)
        with self.graph.inserting_before(chain[-1]):
            node = self.graph.call_module(name, args)
        chain[-1].replace_all_uses_with(node)
        for replaced in reversed(chain):
            self.graph.erase_node(replaced)
        self.erased.update(chain)
        return node

    def _leave_unread_maps(self) -> None:
        """Put zeros into maps that are not active only where something reads them that does not know."""
        for node in self.graph.nodes:
            layer = get_layer(self.traced, node)
            if isinstance(layer, ActiveLayer):
                layer.zeros = not all(self._knows_active(user, node) for user in node.users)

    def _knows_active(self, user: fx.Node, node: fx.Node) -> bool:
        """Tell whether a node's user is told which of its maps are active."""
        is_listed = node in self.active and user.args[:2] == (node, self.active[node])
        return is_listed and isinstance(get_layer(self.traced, user), ActiveLayer)
