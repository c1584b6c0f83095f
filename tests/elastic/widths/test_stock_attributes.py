"""Attributes of stock layers that cut, shape or check channels: these stay as many as the layer's own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.surgery.checking import fix_wrong_widths
from elastic.widths.discovery import discover
from tests.elastic.widths.odd import between
from tests.elastic.zoo import conv

X = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))


def double_first(x: Tensor, place: int) -> Tensor:
    return torch.cat([x[:, :place] * 2, x[:, place:]], 1)


# The network, and the widths that it has beside the last one.
FOLLOWED: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "own number": (
        lambda: between(lambda m, x: x.view(2, m.stem.out_channels, -1).view(x.shape)),
        {"stem": 8},
    ),
    "own number after a shuffle": (
        lambda: between(
            lambda m, x: F.channel_shuffle(x, 2).view(2, m.stem.out_channels, -1).view(x.shape),
        ),
        {"stem": 4},
    ),
    "half": (lambda: between(lambda m, x: double_first(x, m.stem.out_channels // 2)), {"stem": 4}),
    "second half": (
        lambda: between(lambda m, x: x[:, m.stem.out_channels // 2 :] * 2, reads=4),
        {"stem": 4},
    ),
    "three quarters": (
        lambda: between(lambda m, x: double_first(x, m.stem.out_channels * 3 // 4)),
        {"stem": 2},
    ),
    "half of a norm": (
        lambda: between(
            lambda m, x: double_first(m.norm(x), m.norm.num_features // 2), norm=nn.BatchNorm2d(8)
        ),
        {"stem": 4},
    ),
    "half of what is read": (
        lambda: between(lambda m, x: double_first(x, m.last.in_channels // 2)),
        {"stem": 4},
    ),
    "half of groups": (
        lambda: between(
            lambda m, x: double_first(m.each(x), m.each.groups // 2), each=conv(8, 16, 3, groups=8), reads=16
        ),
        {"stem": 2},
    ),
    "another's number": (
        lambda: between(lambda m, x: x[:, : m.one.out_channels] + m.one(x), one=conv(8, 4), reads=4),
        {"stem": 4, "stem:1": 4},
    ),
    "another's number, apart": (
        lambda: between(
            lambda m, x: torch.cat([x[:, : m.one.out_channels], m.one(x)], 1), one=conv(8, 4), reads=8
        ),
        {"stem": 4, "stem:1": 4},
    ),
    "another's number of all channels": (
        lambda: between(
            lambda m, x: x.view(2, m.one.out_channels, -1).view(x.shape) + m.two(m.one(x)),
            one=conv(8, 8),
            two=conv(8, 8),
        ),
        {"stem": 8},
    ),
    "of a subclass": (
        lambda: between(
            lambda m, x: double_first(m.one(x), m.one.out_channels // 2),
            one=type("Own", (nn.Conv2d,), {})(8, 6, 1),
            reads=6,
        ),
        {"stem": 8, "one": 3},
    ),
}


@pytest.mark.parametrize(("build", "sizes"), FOLLOWED.values(), ids=FOLLOWED)
def test_an_attribute_counts_what_the_layer_holds(
    build: Callable[[], nn.Module], sizes: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model = build()
    widths = discover(model, X)
    assert widths.sizes() == sizes | {"last": 5}
    fix_wrong_widths(model, widths)
    assert widths.sizes() == sizes | {"last": 5}


def test_a_number_of_channels_that_come_unequally_often_fixes_them() -> None:
    def forward(m, x: Tensor) -> Tensor:
        y = m.one(torch.cat([x, x[:, : x.shape[1] // 2]], 1))
        return torch.cat([y, m.two(x)[:, : m.one.in_channels]], 1)

    widths = discover(between(forward, one=conv(12, 6), two=conv(8, 12), reads=18), X)
    assert widths.sizes() == {"one": 6, "last": 5}
    assert widths.fixed["stem"] == widths.fixed["two"] == "one.in_channels counts other channels, too"
