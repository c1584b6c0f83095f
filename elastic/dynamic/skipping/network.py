"""Make networks that skip, or the fastest that stock torch has, whichever is faster on this machine."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.modules import iterate_modules, select_set
from elastic.dynamic.norms import SetNorm
from elastic.dynamic.skipping.active import ActiveLayer
from elastic.dynamic.skipping.convolution import ActiveConv2d, Method, list_methods
from elastic.dynamic.skipping.inference import prepare_for_inference, take_first
from elastic.dynamic.skipping.replay import fuse
from elastic.dynamic.skipping.rewrite import rewrite
from elastic.errors import StructureError
from elastic.measure.timing import choose_fastest
from elastic.surgery.layout import lay_out_images, lay_out_weights
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.tracing import get_layer

REPEATS = 5  # of a measurement


def make_skipping(
    net: nn.Module, samples: Tensor | Iterable[Example] = (), method: Method | None = None
) -> nn.Module:
    """Make a network that computes what a network with kernel activation modules engages, and nothing else.

    Args:
        net: from `attach_modules`, or one without modules, which is executed in full.
        samples: inputs as they will come (each a sequence, for a network of several), or one tensor, to
            measure each convolution's fastest method, and whether to skip at all: where it does not pay, the
            result is `make_masked(net)`. Without them all convolutions are carried out by the kernel, or by
            stock torch where that cannot be compiled. A network whose forward asks for sizes needs one.
        method: "kernel", "stock" or "dense" for all convolutions, whatever is faster.

    It has copies of all weights, for each set of modules if norms keep statistics for each, in evaluation
    mode. Outputs equal those of `net.eval()`.

    Raises:
        StructureError: the network is not in fp32 on the CPU, or only contains one with modules.
        OptionError: there is no such method on this machine.
    """
    samples = [samples] if isinstance(samples, Tensor) else list(samples)
    with torch.autocast("cpu", enabled=False):
        return _make_by_set(net, lambda net: _make_skipping(net, samples, method))


def make_masked(net: nn.Module, memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
    """Make the network in stock torch, its norms folded and nothing left out."""
    return _make_by_set(net, lambda net: _make_masked(net, memory_format))


class InFullPrecision(nn.Module):
    """Run a network as it is, in fp32: also within `torch.autocast`, and where it is compiled by torch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise StructureError("a network that skips cannot be exported: export the one that it is made of")
        if torch.compiler.is_dynamo_compiling():  # which would look into calls of the kernel
            return torch.compiler.disable(self._run)(*inputs, **named)  # type: ignore[no-untyped-call]
        return self._run(*inputs, **named)

    def _run(self, *inputs: Any, **named: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return self.net(*inputs, **named)
        with torch.autocast("cpu", enabled=False):
            return self.net(*inputs, **named)


class BySet(nn.Module):
    """Run one of several networks, one for each set of modules: norms, which are folded, differ by set."""

    def __init__(self, net: nn.Module, make: Callable[[nn.Module], nn.Module], sets: int) -> None:
        super().__init__()
        active_set = next(iterate_modules(net)).active_set
        self.nets = nn.ModuleList()
        try:
            for k in range(sets):
                select_set(net, k)
                self.nets.append(make(net))
        finally:
            select_set(net, active_set)
        self._first = (next(iterate_modules(self.nets[0])),)
        select_set(self, active_set)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.nets[self._first[0].active_set](*inputs, **named)


def _make_by_set(net: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    sets = {norm.sets for norm in net.modules() if isinstance(norm, SetNorm)}
    return BySet(net, make, *sets) if sets else make(net)


def _make_skipping(net: nn.Module, samples: Sequence[Example], method: Method | None) -> nn.Module:
    active = InFullPrecision(_fuse(rewrite(net, method, samples)))
    if not samples or method is not None:
        return active
    tuned = rewrite(net, samples=samples)
    tune(tuned, samples)
    # A convolution that is not the kernel's parts what would be one call, which tells only in the whole.
    masked = _make_masked(net, torch.channels_last, samples)
    return choose_fastest([active, InFullPrecision(_fuse(tuned)), masked], samples)


def _fuse(active: fx.GraphModule) -> fx.GraphModule:
    fuse(active, lambda node: _is_compiled(active, node))
    return active


def _is_compiled(active: fx.GraphModule, node: fx.Node) -> bool:
    layer = get_layer(active, node)
    return isinstance(layer, ActiveLayer) and layer.is_compiled


def _make_masked(
    net: nn.Module, memory_format: torch.memory_format, samples: Sequence[Example] = ()
) -> fx.GraphModule:
    traced = prepare_for_inference(net, *take_first(samples))
    lay_out_weights(traced, memory_format)
    for node in list(traced.graph.nodes):
        if node.op == "call_method" and node.target == "view":  # is refused for other memory formats
            node.target = "reshape"
        if node.op == "placeholder":
            with traced.graph.inserting_after(node):
                formatted = traced.graph.call_function(lay_out_images, (node, memory_format))
            node.replace_all_uses_with(formatted, lambda user, formatted=formatted: user is not formatted)
    traced.recompile()
    return traced


def tune(active: fx.GraphModule, samples: Iterable[Example]) -> None:
    """Give each convolution the method that is fastest on the samples, on this machine as it is now."""
    methods = list_methods()
    times: dict[ActiveConv2d, dict[Method, list[float]]] = defaultdict(lambda: {m: [] for m in methods})

    def measure(layer: ActiveConv2d, args: Any, _: object) -> None:
        method = layer.method
        for _repeat in range(REPEATS):
            for layer.method in methods:
                start = time.perf_counter()
                layer.forward(*args)
                times[layer][layer.method].append(time.perf_counter() - start)
        layer.method = method

    layers = [layer for layer in active.modules() if isinstance(layer, ActiveConv2d)]
    hooks = [layer.register_forward_hook(measure) for layer in layers]
    try:
        with torch.inference_mode():
            for sample in samples:
                active(*list_inputs(sample))
    finally:
        for hook in hooks:
            hook.remove()
    for layer, by_method in times.items():
        layer.method = min(methods, key=lambda method: statistics.median(by_method[method]))
