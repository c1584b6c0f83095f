"""The network that skips, or the fastest that stock torch has, whichever is faster on this machine."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.modules import SetNorm, iterate_modules, select_set
from elastic.dynamic.skipping.active import ActiveConv2d
from elastic.dynamic.skipping.inference import prepare_for_inference
from elastic.dynamic.skipping.native import compiled
from elastic.dynamic.skipping.replay import fuse
from elastic.dynamic.skipping.rewrite import ActiveMaxPool2d, ActiveSwitch, rewrite
from elastic.measure.timing import choose_fastest
from elastic.widths.tracing import get_layer

WAYS = ("kernel", "stock", "dense")


class BySet(nn.Module):
    """One network for each set of modules: norms, which are folded, have statistics for each."""

    def __init__(self, net: nn.Module, make: Callable[[nn.Module], nn.Module], sets: int) -> None:
        super().__init__()
        rules = next(iterate_modules(net)).active_set
        self.nets = nn.ModuleList()
        try:
            for k in range(sets):
                select_set(net, k)
                self.nets.append(make(net))
        finally:
            select_set(net, rules)
        self._first = (next(iterate_modules(self.nets[0])),)
        select_set(self, rules)

    def forward(self, x_BCHW: Tensor) -> Any:
        return self.nets[self._first[0].active_set](x_BCHW)


def _by_set(net: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    sets = {len(norm.mean_SC) for norm in net.modules() if isinstance(norm, SetNorm)}
    return BySet(net, make, *sets) if sets else make(net)


def make_skipping(net: nn.Module, samples: Sequence[Tensor] = (), way: str | None = None) -> nn.Module:
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
    return choose_fastest([active, _masked(net, torch.channels_last)], samples) if measured else active


def make_masked(net: nn.Module, memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
    """The network in stock torch, its norms folded and nothing left out."""
    return _by_set(net, lambda one: _masked(one, memory_format))


def _masked(net: nn.Module, memory_format: torch.memory_format) -> fx.GraphModule:
    traced = prepare_for_inference(net).to(memory_format=memory_format)  # type: ignore[call-overload]
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


def _called(active: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a call of the kernel, and nothing else."""
    layer = get_layer(active, node)
    by_kernel = isinstance(layer, ActiveConv2d) and layer.way == "kernel"
    return compiled() is not None and (by_kernel or isinstance(layer, ActiveSwitch | ActiveMaxPool2d))


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
