"""Forwards that a program puts in the place of a module's, against the same network written as one class."""

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic import (
    Levels,
    attach_gates,
    attach_modules,
    compact,
    discover,
    level_sizes,
    make_skipping,
    reindex,
)
from elastic.dynamic.modules import iterate_modules
from elastic.errors import StructureError
from elastic.measure import count_macs
from elastic.pruning.gates import iterate_gates, set_score
from elastic.widths.copying import copy_module

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolve three times; `change` is what a forward of its own does to the second."""

    def __init__(self, change: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.stem, self.mid, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.head, self.change = nn.BatchNorm2d(8), nn.Linear(8, 5), change

    def forward(self, x: Tensor) -> Tensor:
        y = self.mid(self.stem(x).relu())
        y = self.norm(y if self.change is None else self.change(y))
        logits: Tensor = self.head(self.last(y.relu()).relu().mean((2, 3)))
        return logits


def double(y: Tensor) -> Tensor:
    return y * 2


def flip(y: Tensor) -> Tensor:
    return y.flip(1)


def convolve(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias)


def by_method(net: Any, change: Callable[[Tensor], Tensor]) -> None:
    net.mid.forward = MethodType(lambda layer, x: change(convolve(layer, x)), net.mid)


def by_wrapper(net: Any, change: Callable[[Tensor], Tensor]) -> None:
    forward = net.mid.forward
    net.mid.forward = lambda x: change(forward(x))


def by_default(net: Any, change: Callable[[Tensor], Tensor]) -> None:
    net.mid.forward = lambda x, forward=net.mid.forward: change(forward(x))


def by_partial(net: Any, change: Callable[[Tensor], Tensor]) -> None:
    net.mid.forward = partial(lambda layer, x: change(convolve(layer, x)), net.mid)


def by_wrappers(net: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Wrap twice; the inner function calls itself once."""
    forward = net.mid.forward

    def again(x: Tensor, times: int = 1) -> Any:
        return again(x, 0) if times else forward(x)

    net.mid.forward = lambda x: change(again(x))


def of_network(net: Any, change: Callable[[Tensor], Tensor]) -> None:
    def forward(module: Any, x: Tensor) -> Any:
        y = module.norm(change(module.mid(module.stem(x).relu())))
        return module.head(module.last(y.relu()).relu().mean((2, 3)))

    net.forward = MethodType(forward, net)


def of_network_by_wrapper(net: Any, change: Callable[[Tensor], Tensor]) -> None:
    def forward(x: Tensor) -> Any:
        y = net.norm(change(net.mid(net.stem(x).relu())))
        return net.head(net.last(y.relu()).relu().mean((2, 3)))

    net.forward = forward


def of_norm(net: Any, change: Callable[[Tensor], Tensor]) -> None:
    forward = net.norm.forward
    net.norm.forward = lambda y: forward(change(y))


WAYS = (
    by_method,
    by_wrapper,
    by_default,
    by_partial,
    by_wrappers,
    of_network,
    of_network_by_wrapper,
    of_norm,
)
Way = Callable[[Any, Callable[[Tensor], Tensor]], None]
every_way = pytest.mark.parametrize("way", WAYS)
every_change = pytest.mark.parametrize("change", [double, flip])


def make_nets(way: Way, change: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """Make a network with a forward of its own, and the same as one class."""
    torch.manual_seed(0)
    oracle = Net(change)
    net = Net()
    net.load_state_dict(oracle.state_dict())
    way(net, change)
    return net.eval(), oracle.eval()


@every_way
@every_change
def test_widths_are_those_of_the_same_network(way: Way, change: Callable[[Tensor], Tensor]) -> None:
    net, oracle = make_nets(way, change)
    assert torch.equal(net(X), oracle(X))
    widths, expected = discover(net, X, check=True), discover(oracle, X)
    assert widths.sizes() == expected.sizes()
    assert ("mid" in widths) is (change is double)
    assert count_macs(net, X) == count_macs(oracle, X)


@pytest.mark.sampled(5)
@every_way
@every_change
@torch.no_grad()
def test_modules_and_skipping_compute_the_same(way: Way, change: Callable[[Tensor], Tensor]) -> None:
    net, oracle = make_nets(way, change)
    dynamic = attach_modules(net, discover(net, X)).eval()
    for module in iterate_modules(dynamic):
        module.heads[0].linear.bias.fill_(10.0)  # type: ignore[operator, union-attr]
    for network in (dynamic, make_skipping(dynamic, [X]), make_skipping(net, [X])):
        torch.testing.assert_close(network(X), oracle(X))


@every_way
@torch.no_grad()
def test_surgery_levels_and_gates_are_those_of_the_same_network(way: Way) -> None:
    net, oracle = make_nets(way, double)
    for network in (net, oracle):
        widths = discover(network, X)
        reindex(network, widths, {"stem": [3, 2, 1, 0, -1], "mid": [7, 1, 2, 4, 5, 6]})
    torch.testing.assert_close(net(X), oracle(X))
    levels = [Levels(n, w := discover(n, X), level_sizes(n, w, X, [0.5])) for n in (net, oracle)]
    for k in range(2):
        torch.testing.assert_close(levels[0].run(k, X), levels[1].run(k, X))
    for network in (net, oracle):
        attach_gates(network, discover(network, X), "channel")
        for _, _, gate in iterate_gates(network):
            gate.score[1] = -10.0
    torch.testing.assert_close(compact(net, X)(X), compact(oracle, X)(X))


@every_way
@torch.no_grad()
def test_a_copy_is_a_network_of_its_own(way: Way) -> None:
    net, oracle = make_nets(way, double)
    replica = copy_module(net)
    for parameter in net.parameters():
        parameter.zero_()
    torch.testing.assert_close(replica(X), oracle(X))
    replica.mid.weight.zero_()
    replica.mid.bias.zero_()
    oracle.mid.weight.zero_()
    oracle.mid.bias.zero_()
    torch.testing.assert_close(replica(X), oracle(X))


def test_a_function_that_python_would_copy_with_the_model_in_it_is_refused() -> None:
    class Own(Net):
        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            return copy.copy(self)

    net = Own()
    by_wrapper(net, double)
    with pytest.raises(StructureError, match="'forward' of a Conv2d is a function that holds a module"):
        discover(net, X)


class Direct(nn.Sequential):
    """Runs its layers by their forwards, not by calling them."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer.forward(x)
        return x


LAYERS = [
    *(nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.LayerNorm([8, 6, 6])),
    *(nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(), nn.SiLU(), nn.GELU()),
    *(nn.Sigmoid(), nn.LogSigmoid(), nn.Dropout(), nn.Conv2d(8, 8, 1, groups=8), nn.MaxPool2d(2)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_layers_whose_forwards_are_called_are_followed(layer: nn.Module) -> None:
    parts = nn.Conv2d(3, 8, 1), layer, nn.Conv2d(8, 4, 1)
    called, direct = (discover(kind(*parts).eval(), X, check=True) for kind in (nn.Sequential, Direct))
    assert direct.sizes() == called.sizes() and "0" in direct
    tensors = [
        {(s.module, s.tensor, s.dim) for s in widths["0"].slots if not s.tensor.startswith(":")}
        for widths in (direct, called)
    ]
    assert tensors[0] == tensors[1]


def test_a_network_that_calls_forwards_is_compacted_and_skips() -> None:
    torch.manual_seed(0)
    net = Direct(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    attach_gates(net, discover(net, X), "channel")
    for _, _, gate in iterate_gates(net):
        set_score(gate, torch.tensor([1.0, -1.0] * 4).view_as(gate.score))
    plain = compact(net, X)
    torch.testing.assert_close(plain(X), net(X))
    dynamic = attach_modules(plain, discover(plain, X)).eval()
    torch.testing.assert_close(make_skipping(dynamic)(X), dynamic(X))
