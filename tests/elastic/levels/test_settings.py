"""What a program sets in a network's modules while it trains, in the levels of the network."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic import Levels, discover
from tests.elastic.zoo import Net

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def forward(m: Any, x: Tensor) -> Tensor:
    if m.size != tuple(x.shape[2:]):  # a cache: each level has its own
        m.size, m.grid = tuple(x.shape[2:]), torch.ones(x.shape[2:])
    y = m.drop(m.stem(x).relu() / m.temperature) * m.grid
    return m.last(getattr(torch, m.kind)(y))  # type: ignore[no-any-return]


def make_levels() -> tuple[Any, Callable[[], Levels]]:
    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(3, 8, 1), "drop": nn.Dropout(0.0), "last": nn.Conv2d(8, 5, 1)}
    net = Net(forward, temperature=1.0, kind="relu", size=None, grid=None, **layers)
    widths = discover(net, X)
    return net, lambda: Levels(net, widths, [{"stem": 2}, {"stem": 5}])


@pytest.mark.parametrize("training", [True, False])
def test_levels_follow_what_is_set_in_the_network(training: bool) -> None:
    net, make = make_levels()
    levels = make()
    net.train(training)
    first = [levels.run(k, X) for k in range(3)]
    for name, value in (("temperature", 3.0), ("kind", "sigmoid"), ("temperature", 0.5)):
        setattr(net, name, value)
        for k, output in enumerate(first):
            actual, expected = levels.run(k, X), make().run(k, X)
            assert not torch.equal(actual, output)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    net.drop.p = 1.0
    for k in range(3):
        reads_nothing = torch.equal(levels.run(k, X), levels.run(k, -X))
        assert reads_nothing is training


def test_a_level_that_was_set_apart_stays_so() -> None:
    net, make = make_levels()
    levels = make()
    levels[0].temperature = 2.0  # type: ignore[assignment]
    levels.run(0, X)
    assert (net.temperature, levels[0].temperature, levels[1].temperature) == (1.0, 2.0, 1.0)
