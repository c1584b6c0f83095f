"""What published networks put between convolutions: attention, conditioning, coordinates, decoders."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.surgery.checking import fix_wrong_widths
from elastic.surgery.reindexing import grow_index, reindex
from elastic.widths.discovery import find_widths
from tests.elastic.widths.odd import Forward, between
from tests.elastic.zoo import conv

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Build = Callable[[], nn.Module]


def just(forward: Forward, reads: int = 8, **layers: Callable[[], Any]) -> Build:
    return lambda: between(forward, reads, **{name: make() for name, make in layers.items()})


def attend_to_places(m: Any, x: Tensor) -> Tensor:
    """Look at the largest and the mean channel (CBAM, arXiv 1807.06521)."""
    top, _ = torch.max(x, dim=1, keepdim=True)
    return x * m.look(torch.cat([top, x.mean(1, keepdim=True)], 1)).sigmoid()


def add_coordinates(m: Any, x: Tensor) -> Tensor:
    """Join rows' numbers (CoordConv, arXiv 1807.03247)."""
    rows = torch.linspace(-1, 1, 8).view(1, 1, 8, 1).expand(2, 1, 8, 8)
    return m.one(torch.cat([x, rows.type_as(x)], 1))


def drop_blocks(m: Any, x: Tensor) -> Tensor:
    """Drop regions (DropBlock, arXiv 1810.12890), here always the same."""
    mask = (torch.ones(x.size(0), *x.shape[2:]).cumsum(1) < 6).to(x)
    return x * F.max_pool2d(mask[:, None], 3, 1, 1) / mask.mean()


# The sizes of what is free.
FOLLOWED: dict[str, tuple[Build, dict[str, int]]] = {
    "attention to places": (
        just(attend_to_places, look=lambda: conv(2, 1, 7)),
        {"stem": 8},
    ),
    "the smallest channel": (just(lambda m, x: x * x.min(1, True).values), {"stem": 8}),
    "coordinates": (just(add_coordinates, one=lambda: conv(9, 8)), {"stem": 8, "one": 8}),
    "regions": (just(drop_blocks), {"stem": 8}),
    "of the type of others": (
        just(lambda m, x: m.one(x).type_as(x), one=lambda: conv(8, 8)),
        {"stem": 8, "one": 8},
    ),
    "of the type of more": (
        just(lambda m, x: m.one(x).to(x), reads=4, one=lambda: conv(8, 4)),
        {"stem": 8, "one": 4},
    ),
    "of another type": (just(lambda m, x: x.to(torch.float64).to(x)), {"stem": 8}),
}


@pytest.mark.parametrize(("build", "sizes"), FOLLOWED.values(), ids=FOLLOWED)
def test_what_is_published_is_followed(build: Build, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    widths = find_widths(model, X)
    assert widths.sizes() == sizes | {"last": 5}, widths.fixed
    fix_wrong_widths(model, widths)
    assert widths.sizes() == sizes | {"last": 5}, widths.fixed
    for name, size in sizes.items():  # each by itself
        reindex(model, widths, {name: grow_index(size, 2)})
        with torch.no_grad():
            model(X)
    assert find_widths(model, X) == widths


REFUSED: dict[str, tuple[Build, str]] = {
    "the place of the largest channel": (
        just(lambda m, x: x * x.max(1, True)[1]),
        "says which channel is the largest",
    ),
    "both, by names": (
        just(lambda m, x: (lambda top: x * top.values + top.indices)(x.max(1, True))),
        "says which channel is the largest",
    ),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_depends_on_places_is_refused(build: Build, reason: str) -> None:
    torch.manual_seed(0)
    widths = find_widths(build(), X)
    assert list(widths) == ["last"] and reason in widths.fixed["stem"]


def test_a_place_that_is_an_output_fixes_the_channels() -> None:
    layers = nn.ModuleDict({"stem": conv(3, 8), "last": conv(8, 5)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Any:
            y = self.layers["stem"](x)
            return self.layers["last"](y), y.max(1)

    assert not find_widths(Both(), X)
