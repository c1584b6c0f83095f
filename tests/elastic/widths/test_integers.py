"""Sizes that a forward makes whole numbers of are followed, and `int` is as it was."""

import builtins
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.dynamic import attach_modules, make_skipping
from elastic.errors import StructureError
from elastic.surgery.reindexing import grow_index, reindex
from elastic.widths.discovery import discover, find_widths
from elastic.widths.tracing import trace_both_modes
from tests.elastic.widths.odd import Forward, between

X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def gate(m: Any, y: Tensor) -> Tensor:
    """As AttnGAN does, arXiv 1711.10485."""
    half = y.size(1)
    assert half % 2 == 0
    half = int(half / 2)
    return y[:, :half] * torch.sigmoid(y[:, half:])


def swap_parts(m: Any, y: Tensor) -> Tensor:
    """As a ShuffleNetV2 does, arXiv 1807.11164."""
    count = int(y.size(1) * 0.5)
    return torch.cat([y[:, count:], y[:, :count]], 1)


def excite(m: Any, y: Tensor) -> Tensor:
    batch, channels, _, _ = y.size()
    scale = m.fc(F.adaptive_avg_pool2d(y, 1).view([int(batch), -1]))
    return y * scale.view([int(batch), int(channels), 1, 1])


FOLLOWED: dict[str, tuple[Forward, int, dict[str, nn.Module]]] = {
    "halves": (gate, 4, {}),
    "parts": (swap_parts, 8, {}),
    "scales": (excite, 8, {"fc": nn.Linear(8, 8)}),
    "in a function in it": (lambda m, y: (lambda n: y.reshape(-1, n, 10, 10))(int(y.shape[1])), 8, {}),
}


@torch.no_grad()
@pytest.mark.parametrize(("forward", "reads", "layers"), FOLLOWED.values(), ids=FOLLOWED)
def test_channels_that_it_counts_are_followed(
    forward: Forward, reads: int, layers: dict[str, nn.Module]
) -> None:
    torch.manual_seed(0)
    net = between(forward, reads, **layers).eval()
    widths = discover(net, X, check=True)
    assert set(widths) == {"stem", "last"}
    expected = net(X)
    torch.testing.assert_close(trace_both_modes(net, X.to("meta")).eval()(X), expected)
    reindex(net, widths, {name: grow_index(width.size, 2) for name, width in widths.items()})
    torch.testing.assert_close(net(X), expected)
    dynamic = attach_modules(net, widths).eval()
    torch.testing.assert_close(make_skipping(dynamic)(X), dynamic(X), rtol=1e-4, atol=1e-4)


# What takes no traced number, or takes `int` for a type, and whether channels are followed then.
OTHERS: dict[str, tuple[Forward, bool]] = {
    "how often": (lambda m, y: sum((y for _ in range(int(y.shape[1] / 4))), y), False),
    "layer that is made": (lambda m, y: nn.AvgPool2d(int(y.shape[2] / 2))(y), True),
    "another size of images": (lambda m, y: F.interpolate(y, size=(int(y.shape[2] * 1.5), 4)), True),
    "NumPy's type": (lambda m, y: y * float(np.ones(3).astype(int).sum()), True),
    "torch's type": (lambda m, y: y + torch.ones(1, dtype=int), True),  # type: ignore[call-overload]
    "kind of a number": (lambda m, y: y if isinstance(int(y.shape[2]), int) else m.last(y), True),
    "kind of a number that is none": (lambda m, y: m.last(y) if isinstance(0.5, int) else y, True),
    "a text": (lambda m, y: y * int("2"), True),
}


@pytest.mark.parametrize(("forward", "is_followed"), OTHERS.values(), ids=OTHERS)
def test_wherever_else_it_stands_nothing_changes(forward: Forward, is_followed: bool) -> None:
    net = between(forward).eval()
    expected = net(X)
    widths = find_widths(net, X)
    assert ("stem" in widths) == is_followed
    torch.testing.assert_close(trace_both_modes(net, X.to("meta")).eval()(X), expected)


@pytest.mark.parametrize("forward", [swap_parts, lambda m, y: y * int(y.sum())])
def test_afterwards_it_is_the_usual_one(forward: Callable[..., Any]) -> None:
    try:
        find_widths(between(forward), X)
    except StructureError as error:
        assert "depends on the data" in str(error)
    assert "int" not in globals() and int is builtins.int


class Halving(nn.Module):
    """Halve channels in a static method."""

    def forward(self, x: Tensor) -> Tensor:
        return self.halve(x)

    @staticmethod
    def halve(x: Tensor) -> Tensor:
        count = int(x.shape[1] / 2)
        return x[:, :count] + x[:, count:]


def test_static_methods_are_looked_into() -> None:
    net = between(lambda m, y: m.halving(y), 4, halving=Halving())
    assert discover(net, X, check=True).sizes() == {"stem": 4, "last": 5}
