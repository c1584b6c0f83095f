"""Group norms in all their spellings: whole groups come and go, and the others do not feel it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic import Levels, discover, grow_index, level_sizes, reindex
from tests.elastic.zoo import randomised

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Called(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps).relu()


class Converted(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).type(input.dtype)


class Own(nn.Module):
    """Holds the number of groups, and what scales channels."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.groups, self.gain = groups, nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups) * self.gain.view(-1, 1, 1)


class Borrowing(nn.Module):
    """Calls the function with what a norm holds."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.norm.num_groups, self.norm.weight, self.norm.bias)


class Written(Own):
    """Has the number of groups in its code."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2) * self.gain.view(-1, 1, 1)


def make(norm: Callable[[int, int], Any], groups: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 6, 1),
        norm(groups, 6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 1),
        norm(groups, 8),
        nn.Conv2d(8, 4, 1),
    )
    return randomised(nn.Sequential(*layers)).eval()


@pytest.mark.parametrize("norm", [nn.GroupNorm, Called, Converted, Own, Borrowing])
def test_fresh_groups_are_not_felt_and_levels_are_the_first_groups(norm: type[nn.Module]) -> None:
    net = make(norm)
    widths = discover(net, X, check=True)
    assert widths.sizes() == {"0": 2, "3": 2} and not any(width.mixed for width in widths.values())
    expected = net(X).detach()
    reindex(net, widths, {"0": grow_index(2, 2), "3": [1, -1, 0]})
    torch.testing.assert_close(net(X), expected)
    assert [net[0].out_channels, net[3].out_channels] == [12, 12]
    (sizes,) = level_sizes(net, widths, X, [0.5])
    level = Levels(net, widths, [sizes])[0]
    cut = make(norm)
    reindex(cut, discover(cut, X), {name: [0] * size for name, size in sizes.items()})
    cut.load_state_dict(level.state_dict())
    torch.testing.assert_close(level(X), cut(X))


@pytest.mark.parametrize(("norm", "groups"), [(nn.GroupNorm, 1), (Written, 2)])
def test_groups_whose_number_stays_change_alike(norm: type[nn.Module], groups: int) -> None:
    widths = discover(make(norm, groups), X, check=True)
    assert widths.sizes() == {"0": 6 // groups, "3": 8 // groups}
    assert all("normalises over its channels" in str(width.mixed) for width in widths.values())


def test_a_group_over_two_layers_channels_stays() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 10, 1)
            self.norm, self.last = nn.GroupNorm(6, 18), nn.Conv2d(18, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(torch.cat([self.a(x), self.b(x)], 1)))  # type: ignore[no-any-return]

    net = randomised(Joined()).eval()
    widths = discover(net, X, check=True)
    assert widths.sizes() == {"a": 2, "b": 3} and "a:1" in widths.fixed
    expected = net(X).detach()
    reindex(net, widths, {"a": grow_index(2, 1), "b": [2, -1, 0, 1]})
    torch.testing.assert_close(net(X), expected)
    assert [net.a.out_channels, net.b.out_channels, net.norm.num_groups] == [11, 13, 8]
