"""What a program sets in a network's modules while it trains, in the levels of the network."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic import Levels, discover
from elastic.training.structure import Structure
from tests.elastic.zoo import Net


class Norm(nn.BatchNorm2d):
    """Normalise by the function, as a forward of one's own has to, and rectify."""

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        y = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        return F.relu(y)


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


def test_levels_follow_a_part_that_is_in_evaluation() -> None:
    net, make = make_levels()
    levels = make()
    net.drop.p = 0.5
    net.train().drop.eval()
    for k in range(3):
        assert torch.equal(levels.run(k, X), levels.run(k, X))
    net.train()
    for k in range(3):
        assert not torch.equal(levels.run(k, X), levels.run(k, X))


def test_norms_of_levels_keep_the_mode_of_the_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    levels = Levels(net, discover(net, X), [{"0": 4}])
    net.train()[1].eval()
    before = [level[1].running_mean.clone() for level in levels]  # type: ignore[index, operator, union-attr]
    for k in range(2):
        levels.run(k, X)
    moved = [
        not torch.equal(mean, level[1].running_mean)  # type: ignore[index, arg-type]
        for mean, level in zip(before, levels, strict=True)
    ]
    assert moved == [True, False]


def test_norms_of_a_level_with_modules_are_in_the_mode_of_this_call() -> None:
    """Norms of a class of their own stand in a trace as torch's: they are brought into the level's mode."""
    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(3, 8, 1), "norm": Norm(8), "last": nn.Conv2d(8, 5, 1)}
    net = Net(lambda m, x: m.last(m.norm(m.stem(x))), **layers)
    structure = Structure(net, X)
    structure.nest(Levels(net, structure.widths, [{"stem": 4}]))
    structure.attach_dynamic()
    for training in (True, False, True):
        net.train(training)
        for k in range(2):
            mean = structure.nets[k].norm.running_mean  # type: ignore[union-attr]
            before = mean.clone()  # type: ignore[operator]
            structure.run(k, X)
            assert torch.equal(mean, before) is not training  # type: ignore[arg-type]


def test_levels_of_a_copy_follow_the_copy() -> None:
    net, make = make_levels()
    levels = copy.deepcopy(make())
    net.temperature = 3.0
    levels.net.temperature = 0.5  # type: ignore[assignment]
    levels.run(0, X)
    assert levels[0].temperature == 0.5
