"""Execution that leaves out what kernel activation modules have switched off.

The traced network is rewritten for inference on the CPU: norms are folded into convolutions, convolutions
take the addition and the ReLU behind them, and each of them, each module and each pooling is told which
channels of what it reads are active. How a convolution is carried out (by the kernel, by stock torch on
gathered weights, or dense and masked) is measured on this machine, layer by layer; and then whether all of it
is faster than stock torch, which skips nothing and only masks.
"""

import copy
import operator
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from elastic.active import Active, ActiveConv2d, max_pool, switch
from elastic.dynamic import keeps_zero
from elastic.kam import KernelActivation, SetNorm, choose, modules
from elastic.native import compiled
from elastic.replay import fuse
from elastic.timing import fastest
from elastic.trace import BATCH_NORM, trace

WAYS = ("kernel", "stock", "dense")
ADD = (operator.add, torch.add, operator.iadd)


class ActiveSwitch(nn.Module):
    """A kernel activation module at inference: maps and the active ones among them → the kernels engaged.

    Its set of weights is looked up for each input, so that another one may be chosen between requests.
    """

    def __init__(self, module: KernelActivation) -> None:
        super().__init__()
        self.module = module
        self.folded = [head.folded() for head in module.heads]  # type: ignore[operator]

    def forward(self, x_BCHW: Tensor, reads: Active | None = None) -> Active:
        weight_KC, bias_K = self.folded[self.module.chosen]
        return switch(x_BCHW, reads, weight_KC, bias_K, self.module.choice == "ramp")


class ActiveMaxPool2d(nn.Module):
    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride, self.zeros = size, stride, True

    def forward(self, x_BCHW: Tensor, reads: Active) -> Tensor:
        return max_pool(x_BCHW, reads, self.size, self.stride, self.zeros)


def scale(x_BCHW: Tensor, active: Active) -> Tensor:
    """Maps times their gates."""
    return active.scale(x_BCHW)


class BySet(nn.Module):
    """One network for each set of modules: norms, which are folded, have statistics for each."""

    def __init__(self, net: nn.Module, make: Callable[[nn.Module], nn.Module], sets: int) -> None:
        super().__init__()
        rules = next(modules(net)).chosen
        self.nets = nn.ModuleList()
        for k in range(sets):
            choose(net, k)
            self.nets.append(make(net))
        self._first = (next(modules(self.nets[0])),)
        for held in (net, self):
            choose(held, rules)

    def forward(self, x_BCHW: Tensor) -> Any:
        return self.nets[self._first[0].chosen](x_BCHW)


def _by_set(net: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    sets = {len(norm.mean_SC) for norm in net.modules() if isinstance(norm, SetNorm)}
    return BySet(net, make, *sets) if sets else make(net)


def skipping(net: nn.Module, samples: Sequence[Tensor] = (), way: str | None = None) -> nn.Module:
    """A network that computes what a network with kernel activation modules engages, and nothing else.

    Args:
        net: from `elastic.dynamic.attach`, or one without modules, which is executed in full.
        samples: inputs as they will come, to measure each convolution's fastest way, and whether to skip at
            all: where it does not pay, the result is `masked(net)`. Without them all convolutions are
            carried out by the kernel, or by stock torch where that cannot be compiled.
        way: "kernel", "stock" or "dense" for all convolutions, whatever is faster.

    It has copies of all weights, for each set of modules if norms keep statistics for each, in evaluation
    mode. Outputs equal those of `net.eval()`.
    """
    return _by_set(net, lambda one: _skipping(one, samples, way))


def _skipping(net: nn.Module, samples: Sequence[Tensor], way: str | None) -> nn.Module:
    active = rewrite(net, way)
    measured = len(samples) > 0 and way is None
    if measured:
        tune(active, samples)
    fuse(active, lambda node: _called(active, node))
    return fastest([active, _masked(net, torch.channels_last)], samples) if measured else active


def rewrite(net: nn.Module, way: str | None = None) -> fx.GraphModule:
    """A network that is told, layer by layer, which channels are active."""
    traced = _for_inference(net)
    _leave_out_identities(traced)
    best = way or ("stock" if compiled() is None else "kernel")
    return _Rewriter(traced, best).run()


def masked(net: nn.Module, memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
    """The network in stock torch, its norms folded and nothing left out."""
    return _by_set(net, lambda one: _masked(one, memory_format))


def _masked(net: nn.Module, memory_format: torch.memory_format) -> fx.GraphModule:
    traced = _for_inference(net).to(memory_format=memory_format)  # type: ignore[call-overload]
    for node in list(traced.graph.nodes):
        if node.op == "call_method" and node.target == "view":  # is refused for other memory formats
            node.target = "reshape"
        if node.op == "placeholder":
            with traced.graph.inserting_after(node):
                laid = traced.graph.call_function(laid_out, (node, memory_format))
            node.replace_all_uses_with(laid, lambda user, laid=laid: user is not laid)
    traced.recompile()
    return traced  # type: ignore[no-any-return]


def laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x


def _for_inference(net: nn.Module) -> fx.GraphModule:
    copied = copy.deepcopy(net).eval()
    traced = copied if isinstance(copied, fx.GraphModule) else trace(copied)
    fold_norms(traced)
    return traced


def _called(active: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a call of the kernel, and nothing else."""
    layer = active.get_submodule(str(node.target)) if node.op == "call_module" else None
    by_kernel = isinstance(layer, ActiveConv2d) and layer.way == "kernel"
    return compiled() is not None and (by_kernel or isinstance(layer, ActiveSwitch | ActiveMaxPool2d))


def fold_norms(traced: fx.GraphModule) -> None:
    """Fold each batch norm that alone reads a convolution into it, in place."""
    layers = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        norm = layers.get(str(node.target)) if node.op == "call_module" else None
        before = node.args[0] if isinstance(norm, BATCH_NORM | SetNorm) else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv = layers.get(str(before.target))
        calls = [n for n in traced.graph.nodes if n.op == "call_module" and n.target == before.target]
        if isinstance(conv, nn.Conv2d) and len(calls) == 1:
            owner, _, name = str(before.target).rpartition(".")
            setattr(traced.get_submodule(owner), name, fuse_conv_bn_eval(conv, norm))  # type: ignore[arg-type]
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.recompile()


def _leave_out_identities(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        layer = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.Identity | nn.Dropout | nn.Dropout2d):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


class _Rewriter:
    """Replaces what a traced network calls by what knows which channels are active."""

    def __init__(self, traced: fx.GraphModule, way: str) -> None:
        self.traced, self.graph, self.way = traced, traced.graph, way
        self.active: dict[fx.Node, fx.Node] = {}  # a tensor's node -> that of its active channels
        self.count = 0

    def run(self) -> fx.GraphModule:
        for node in list(self.graph.nodes):
            layer = self._layer(node)
            if isinstance(layer, KernelActivation):
                self._replace(node, node, ActiveSwitch(layer), (node.args[0], self._reads(node)))
            elif isinstance(layer, nn.Conv2d) and ActiveConv2d.takes(layer):
                self._convolution(node, layer)
            elif isinstance(layer, nn.MaxPool2d) and _plain(layer) and self._reads(node) is not None:
                pool = ActiveMaxPool2d(_one(layer.kernel_size), _one(layer.stride))
                self._replace(node, node, pool, (node.args[0], self._reads(node)), self._reads(node))
            elif self._shuts(node):
                node.target, gate = scale, node.args[1]
                self.active[node] = gate
            elif node.op.startswith("call") and keeps_zero(self.traced, node) and self._reads(node):
                self.active[node] = self._reads(node)  # type: ignore[assignment]
        self.graph.eliminate_dead_code()
        self._leave_what_nobody_reads()
        self.traced.delete_all_unused_submodules()
        self.graph.lint()
        self.traced.recompile()
        return self.traced

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _reads(self, node: fx.Node) -> fx.Node | None:
        read = node.args[0] if node.args else None
        return self.active.get(read) if isinstance(read, fx.Node) else None

    def _shuts(self, node: fx.Node) -> bool:
        gate = node.args[1] if node.target is torch.mul else None
        return isinstance(gate, fx.Node) and isinstance(self._layer(gate), ActiveSwitch)

    def _replace(
        self,
        first: fx.Node,
        last: fx.Node,
        made: nn.Module,
        args: tuple[Any, ...],
        active: fx.Node | None = None,
    ) -> fx.Node:
        """Call `made` where `last` was, which ends what began with `first`."""
        name, self.count = f"active{self.count}", self.count + 1
        self.traced.add_submodule(name, made)
        with self.graph.inserting_before(last):
            node = self.graph.call_module(name, args)
        last.replace_all_uses_with(node)
        if active is not None:
            self.active[node] = active
        return node

    def _convolution(self, node: fx.Node, conv: nn.Conv2d) -> None:
        last, writes, residual, relu = node, None, None, False
        user = _only_user(last)
        if user is not None and self._shuts(user) and user.args[0] is last:
            last, writes = user, user.args[1]
        user = _only_user(last)
        if user is not None and writes is None and (other := _added(user, last)) is not None:
            last, residual = user, other
        user = _only_user(last)
        if user is not None and _is_relu(self._layer(user), user):
            last, relu = user, True
        made = ActiveConv2d(conv, relu, True, self.way)
        args = (node.args[0], self._reads(node), writes, residual)
        self._replace(node, last, made, args, writes)  # type: ignore[arg-type]

    def _leave_what_nobody_reads(self) -> None:
        """Maps that are not active have to be zeros only where something reads them that does not know."""
        for node in reversed(list(self.graph.nodes)):
            layer = self._layer(node)
            if isinstance(layer, ActiveConv2d | ActiveMaxPool2d):
                layer.zeros = not all(self._knows(user, node) for user in node.users)

    def _knows(self, user: fx.Node, node: fx.Node) -> bool:
        layer = self._layer(user)
        known = isinstance(layer, ActiveConv2d | ActiveMaxPool2d | ActiveSwitch)
        return known and node in self.active and user.args[:2] == (node, self.active[node])


def tune(active: fx.GraphModule, samples: Iterable[Tensor], repeats: int = 5) -> None:
    """Give each convolution the way that is fastest on the samples, on this machine as it is now."""
    layers = [m for m in active.modules() if isinstance(m, ActiveConv2d)]
    ways = [way for way in WAYS if way != "kernel" or compiled() is not None]
    took: dict[ActiveConv2d, dict[str, list[float]]] = {layer: {way: [] for way in ways} for layer in layers}

    def measure(layer: nn.Module, args: Any, out: Any) -> None:
        assert isinstance(layer, ActiveConv2d)
        chosen = layer.way
        for _ in range(repeats):
            for layer.way in ways:
                start = time.perf_counter()
                layer.forward(*args)
                took[layer][layer.way].append(time.perf_counter() - start)
        layer.way = chosen

    hooks = [layer.register_forward_hook(measure) for layer in layers]
    try:
        with torch.inference_mode():
            for x_BCHW in samples:
                active(x_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in layers:
        layer.way = min(ways, key=lambda way: statistics.median(took[layer][way]))


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _added(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """What else is added, where a node is the sum of two tensors."""
    if user.op == "call_function" and user.target in ADD and len(user.args) == 2 and not user.kwargs:
        others = [arg for arg in user.args if arg is not node]
        if len(others) == 1 and isinstance(others[0], fx.Node):
            return others[0]
    return None


def _is_relu(layer: nn.Module | None, node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return type(layer) is nn.ReLU or (layer is None and name.strip("_") == "relu")


def _plain(pool: nn.MaxPool2d) -> bool:
    square = all(isinstance(value, int) or len(set(value)) == 1 for value in (pool.kernel_size, pool.stride))
    return square and _one(pool.padding) == 0 and _one(pool.dilation) == 1 and not pool.ceil_mode


def _one(value: Any) -> int:
    return value if isinstance(value, int) else int(value[0])
