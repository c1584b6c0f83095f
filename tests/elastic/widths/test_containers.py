"""What a forward keeps in lists and dictionaries of its modules, by its trace and by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic import attach_modules, discover, make_skipping
from elastic.dynamic.modules import iterate_modules
from elastic.widths.tracing import trace_both_modes
from tests.elastic.zoo import PROGRAMS, Net

X = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
Forward = Callable[[Any, Tensor], Tensor]


def append(m: Any, x: Tensor) -> Tensor:
    """Leave it to the program to empty the list."""
    y = m.stem(x)
    m.maps.append(y)
    m.maps.append(m.mid(y.relu()))
    return m.last(m.maps[-1])  # type: ignore[no-any-return]


def clear_and_append(m: Any, x: Tensor) -> Tensor:
    m.maps.clear()
    return append(m, x)


def delete_and_extend(m: Any, x: Tensor) -> Tensor:
    del m.maps[:]
    m.maps.extend([m.stem(x), (m.stem(2 * x), x)])
    return m.last(m.mid(m.maps[0]))  # type: ignore[no-any-return]


def insert(m: Any, x: Tensor) -> Tensor:
    y = m.mid(m.stem(x))
    m.maps[:] = [y]
    return m.last(y)  # type: ignore[no-any-return]


def name(m: Any, x: Tensor) -> Tensor:
    m.named["stem"] = m.stem(x)
    m.named["mid"] = m.mid(m.named["stem"].relu())
    return m.last(m.named["mid"])  # type: ignore[no-any-return]


def name_in_training(m: Any, x: Tensor) -> Tensor:
    y = m.mid(m.stem(x))
    if m.training:
        m.named["mid"] = y
        m.maps.append(y)
    return m.last(y)  # type: ignore[no-any-return]


def keep_by_size(m: Any, x: Tensor) -> Tensor:
    """Keep coordinates by the size of the image, which may be another one for a caller that traces anew."""
    size = tuple(x.shape[2:])
    if size not in m.named:
        m.named[size] = torch.ones(size)
    return m.last(m.mid(m.stem(x) * m.named[size]))  # type: ignore[no-any-return]


def keep_nothing(m: Any, x: Tensor) -> Tensor:
    for y in m.maps:
        x = x + y
    return m.last(m.mid(m.stem(x)))  # type: ignore[no-any-return]


KEEPING: tuple[Forward, ...] = (
    *(append, clear_and_append, delete_and_extend, insert, name, name_in_training),
)


def make_net(forward: Forward) -> Any:
    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(3, 4, 1), "mid": nn.Conv2d(4, 4, 1), "last": nn.Conv2d(4, 2, 1)}
    return Net(forward, maps=[], named={}, **layers)


def run(net: Any, call: nn.Module, empties: Callable[[int], bool]) -> list[Any]:
    """Call a network, or what was made of it, and list what it holds after each call."""
    contents = []
    for k, x in enumerate(X):
        if empties(k):
            net.maps.clear()
            net.named.clear()
        call(x)
        contents.append(([*net.maps], {**net.named}))
    net.maps.clear()
    net.named.clear()
    return contents


@pytest.mark.sampled(10)
@pytest.mark.parametrize("empties", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("forward", KEEPING)
def test_a_trace_keeps_what_its_forward_keeps(
    forward: Forward, training: bool, empties: Callable[[int], bool]
) -> None:
    net = make_net(forward)
    traced = trace_both_modes(net, X[0].to("meta")).train(training)
    assert (net.maps, net.named) == ([], {})
    net.train(training)
    torch.testing.assert_close(run(net, traced, empties), run(net, net, empties), rtol=0, atol=0)


@pytest.mark.parametrize("forward", KEEPING)
def test_a_list_that_holds_something_when_it_is_traced(forward: Forward) -> None:
    net = make_net(forward)
    net.maps.append(torch.zeros(1))
    traced = trace_both_modes(net, X[0].to("meta")).eval()
    assert len(net.maps) == 1
    net.eval()
    contents = []
    for call in (traced, net):
        net.maps[:] = [torch.zeros(1)]
        call(X[0])
        contents.append([*net.maps])
    torch.testing.assert_close(*contents, rtol=0, atol=0)


@pytest.mark.parametrize("forward", [keep_by_size, keep_nothing])
def test_caches_and_what_is_only_read_stay_as_they_are(forward: Forward) -> None:
    net = make_net(forward).eval()
    traced = trace_both_modes(net, X[0].to("meta")).eval()
    for x in X:
        traced(x)
    assert (net.maps, net.named) == ([], {})
    torch.testing.assert_close(traced(X[0]), net(X[0]), rtol=0, atol=0)


def test_what_a_hook_keeps_is_kept_once() -> None:
    net = make_net(lambda m, x: m.last(m.mid(m.stem(x))))
    net.mid.register_forward_hook(lambda module, args, output: net.maps.append(output))
    traced = trace_both_modes(net, X[0].to("meta")).eval()
    traced(X[0])
    assert len(net.maps) == 1


def test_a_loss_on_what_is_kept_trains_a_network_with_modules() -> None:
    net = make_net(clear_and_append)
    dynamic = attach_modules(net, discover(net, X[0]))
    modules = list(iterate_modules(dynamic))
    assert len(modules) == 2
    for module in modules:
        nn.init.constant_(module.heads[0].linear.bias, 10.0)  # type: ignore[operator, union-attr, arg-type]
    gradients = []
    for call in (dynamic, net):
        net.zero_grad()
        call(X[0])
        sum(y.square().mean() for y in net.maps).backward()  # type: ignore[union-attr]
        gradients.append([net.stem.weight.grad.clone(), net.mid.weight.grad.clone()])
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_a_skipping_network_keeps_nothing_in_the_network_that_it_was_made_of() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.first = m.stem(x)
        return append(m, x)

    net = make_net(forward).eval()
    dynamic = attach_modules(net, discover(net, X[0])).eval()
    for network in (make_skipping(net, [X[0]]), make_skipping(dynamic, [X[0]])):
        network(X[0])
    assert net.maps == [] and not hasattr(net, "first")
