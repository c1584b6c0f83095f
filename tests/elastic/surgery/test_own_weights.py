"""Layers of a program's own whose weights have names of their own: all is as with torch's layers."""

from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.growth.gradmax import gradmax
from elastic.levels.importance import Importance, score_channels
from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes
from elastic.measure.counts import census, count_macs_per_weight
from elastic.pruning.compaction import compact
from elastic.pruning.fitting import fit_gates_to_budget, keep_largest_weights, measure_compacted
from elastic.pruning.gates import Grain, attach_gates, find_grain, iterate_gates, set_score
from elastic.pruning.live import count_live_params
from elastic.surgery.fresh import STRATEGIES, Fresh
from elastic.surgery.indices import grow_index, split_index
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import Widths, discover

X, Y = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


class OwnConv(nn.Module):
    def __init__(self, reads: int, writes: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(writes, reads, 3, 3))
        self.bias = nn.Parameter(torch.empty(writes))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.bias, padding=1)


class OwnLinear(nn.Module):
    def __init__(self, reads: int, writes: int) -> None:
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.empty(writes, reads)), nn.Parameter(torch.empty(writes))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias)


def build(
    convolve: Callable[[int, int], nn.Module], project: Callable[[int, int], nn.Module], seed: int = 0
) -> nn.Module:
    net = nn.Sequential(
        *(convolve(3, 6), nn.BatchNorm2d(6), nn.ReLU(), convolve(6, 8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AvgPool2d(4), nn.Flatten(), project(32, 7), nn.ReLU(), project(7, 5)),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return net.eval()


def make_pair() -> list[tuple[nn.Module, Widths]]:
    """Make two networks of the same weights, of torch's layers and of a program's own."""
    nets = [build(lambda i, o: nn.Conv2d(i, o, 3, padding=1), nn.Linear), build(OwnConv, OwnLinear)]
    return [(net, discover(net, X, check=True)) for net in nets]


def compute_loss(net: nn.Module) -> Tensor:
    return F.cross_entropy(net(X), Y)


def close_gates(net: nn.Module) -> None:
    """Close half of the gates, the same ones in both networks."""
    generator = torch.Generator().manual_seed(1)
    for _, _, gate in iterate_gates(net):
        draw = torch.where(torch.rand(gate.score.shape, generator=generator) < 0.5, 1.0, -1.0)
        draw.flatten()[0] = 1.0
        set_score(gate, draw)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(first(X), second(X))


def test_widths_and_counts() -> None:
    (stock, stock_widths), (own, widths) = make_pair()
    assert widths.sizes() == stock_widths.sizes() == {"0": 6, "3": 8, "8": 7}
    assert census(own, widths, X) == census(stock, stock_widths, X)
    assert count_macs_per_weight(own, X) == count_macs_per_weight(stock, X)


@pytest.mark.parametrize("fresh", STRATEGIES.values(), ids=STRATEGIES)
def test_growth_with_an_optimizer(fresh: Fresh) -> None:
    states = []
    pair = make_pair()
    for net, widths in pair:
        optimizer = torch.optim.Adam(net.parameters())
        compute_loss(net).backward()
        optimizer.step()
        changes = {
            "0": grow_index(6, 3),
            "3": split_index(8, 2, torch.Generator().manual_seed(0)),
            "8": [2, -1, 0],
        }
        reindex(net, widths, changes, optimizers=[optimizer], fresh=fresh)
        states.append([value for p in net.parameters() for value in optimizer.state[p].values()])
        compute_loss(net).backward()
    assert_same(pair[0][0], pair[1][0])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_growth_by_gradients() -> None:
    pair = make_pair()
    for net, widths in pair:
        rows = gradmax(net, widths, {"0": 2, "8": 3}, compute_loss, torch.Generator().manual_seed(0))
        reindex(net, widths, {"0": grow_index(6, 2), "8": grow_index(7, 3)}, fresh=rows)
    assert_same(pair[0][0], pair[1][0])


@pytest.mark.parametrize("grain", get_args(Grain))
def test_gates_and_compaction(grain: Grain) -> None:
    (stock, stock_widths), (own, widths) = make_pair()
    for net, own_widths in ((stock, stock_widths), (own, widths)):
        attach_gates(net, own_widths, grain)
        close_gates(net)
    assert find_grain(own) == find_grain(stock) == grain
    assert torch.equal(own(X), stock(X))
    assert count_live_params(own, widths) == count_live_params(stock, stock_widths)
    compute_loss(own).backward()
    compute_loss(stock).backward()
    scores = [[gate.score.grad for _, _, gate in iterate_gates(net)] for net in (own, stock)]
    assert scores[0] and all(torch.equal(a, b) for a, b in zip(*scores, strict=True))
    plain = compact(own, X)
    torch.testing.assert_close(plain(X), own(X))
    if grain == "channel":  # else constants of norms move into biases of torch's layers alone
        assert_same(plain, compact(stock, X))


def test_a_budget_is_met() -> None:
    for net, widths in make_pair():
        attach_gates(net, widths, "weight")
        measure = partial(measure_compacted, net, X)
        fit_gates_to_budget(net, 300, keep_largest_weights, measure)
        assert measure() in range(294, 301)


@pytest.mark.parametrize("importance", get_args(Importance))
def test_importance(importance: Importance) -> None:
    (stock, _), (own, _) = make_pair()
    scores = []
    for net in (stock, own):
        part = discover(net, X, only=["0", "3"])
        attach_gates(net, part, "channel")
        close_gates(net)
        scores.append(score_channels(net, part, importance, [(X, Y)]))
    assert scores[0].keys() == scores[1].keys()
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


def test_levels() -> None:
    pair = make_pair()
    first, second = (Levels(net, widths, level_sizes(net, widths, X, [0.25, 0.5])) for net, widths in pair)
    for k in range(3):
        assert torch.equal(first[k](X), second[k](X))
