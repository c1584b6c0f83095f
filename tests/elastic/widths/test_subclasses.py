"""Subclasses of stock layers, and functions in place of layers: followed wherever they compute the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.pruning.gates import attach_gates
from elastic.surgery.checking import fix_wrong_widths
from elastic.widths.discovery import discover, find_widths
from tests.elastic.widths.odd import between
from tests.elastic.zoo import Net, conv

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class BareConv(nn.Conv2d):
    """Nothing new."""


class NamedConv(BareConv):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.note = "made in another way"

    def extra_repr(self) -> str:
        return self.note


class SameConv(nn.Conv2d):
    """Pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class FlippedConv(nn.Conv2d):
    """Computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


class HalvedConv(nn.Conv2d):
    """Computes with another weight."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.sum(), bias)


class ActivatedNorm(nn.BatchNorm2d):
    """Norm and activation in one."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        return F.relu(F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm of maps, through another order of dimensions (ConvNeXt, arXiv 2201.03545)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ChannelsFirstNorm(nn.Module):
    """Layer norm of maps, written out (ConvNeXt, arXiv 2201.03545)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GroupNorm1(nn.GroupNorm):
    """Group norm by its function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class OwnLinear(nn.Module):
    """A linear layer that is no nn.Linear."""

    def __init__(self, reads: int, writes: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(writes, reads)), nn.Parameter(torch.randn(writes))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LeakySlopes(nn.PReLU):
    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.weight)


def one(layer: nn.Module, reads: int = 8) -> nn.Module:
    return between(lambda m, x: m.one(x), one=layer, reads=reads)


FOLLOWED: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "bare": (lambda: one(BareConv(8, 8, 1)), {"one"}),
    "named": (lambda: one(NamedConv(8, 8, 1)), {"one"}),
    "same padding": (lambda: one(SameConv(8, 8, 3)), {"one"}),
    "same padding, grouped": (lambda: one(SameConv(8, 8, 3, groups=2)), {"one"}),
    "same padding, depthwise": (lambda: one(SameConv(8, 8, 3, groups=8)), set()),
    "same padding, multiplied": (lambda: one(SameConv(8, 16, 3, groups=8), reads=16), set()),
    "norm and activation": (lambda: one(ActivatedNorm(8)), set()),
    "layer norm of maps": (lambda: one(LayerNorm2d(8)), set()),
    "layer norm written out": (lambda: one(ChannelsFirstNorm(8)), set()),
    "group norm": (lambda: one(GroupNorm1(2, 8)), set()),
    "slopes": (lambda: one(LeakySlopes(8)), set()),
    "one slope": (lambda: one(LeakySlopes(1)), set()),
    "linear": (
        lambda: Net(
            lambda m, x: m.out(F.relu(m.one(m.stem(x).mean((2, 3))))),
            **dict(stem=conv(3, 8), one=OwnLinear(8, 6), out=nn.Linear(6, 5)),
        ),
        {"one"},
    ),
    "layer norm by the weight's shape": (
        lambda: between(
            lambda m, x: F.layer_norm(x.transpose(1, 3), m.scale.shape, m.scale).transpose(1, 3),
            scale=nn.Parameter(torch.ones(8)),
        ),
        set(),
    ),
    "groups by the number of channels": (
        lambda: between(
            lambda m, x: F.conv2d(x, m.weight, None, 1, 1, 1, x.shape[1]),
            weight=nn.Parameter(torch.randn(8, 1, 3, 3)),
        ),
        set(),
    ),
    "a transposed convolution": (
        lambda: between(
            lambda m, x: F.conv_transpose2d(x, m.weight, stride=2),
            weight=nn.Parameter(torch.randn(8, 8, 2, 2)),
        ),
        {"weight"},
    ),
    "another, of groups by an attribute": (
        lambda: between(
            lambda m, x: F.conv_transpose2d(x, m.one.weight, groups=m.one.groups),
            one=nn.ConvTranspose2d(8, 8, 2, groups=8, bias=False),
        ),
        set(),
    ),
    "another weight": (lambda: one(HalvedConv(8, 8, 1)), {"one"}),
    "a weight of another name": (
        lambda: between(lambda m, x: F.conv2d(x, m.kernel), kernel=nn.Parameter(torch.randn(8, 8, 1, 1))),
        {"kernel"},
    ),
    "keywords": (
        lambda: between(
            lambda m, x: F.conv2d(input=x, weight=m.weight, padding=1),
            weight=nn.Parameter(torch.randn(8, 8, 3, 3)),
        ),
        {"weight"},
    ),
}


@pytest.mark.parametrize(("build", "more"), FOLLOWED.values(), ids=FOLLOWED)
def test_what_computes_as_a_stock_layer_is_followed(build: Callable[[], nn.Module], more: set[str]) -> None:
    torch.manual_seed(0)
    model = build()
    widths = discover(model, X)
    outer = {"stem", "last"} & {name for name, _ in model.named_children()}
    assert set(widths) == outer | more
    fix_wrong_widths(model, widths)
    assert set(widths) == outer | more, widths.fixed
    assert discover(model, X) == widths


@pytest.mark.parametrize("build", [lambda: SameConv(8, 8, 3), lambda: BareConv(8, 8, 1)])
def test_a_gated_subclass_is_followed_as_before(build: Callable[[], nn.Module]) -> None:
    model = one(build())
    widths = discover(model, X)
    attach_gates(model, widths, "weight")
    assert discover(model, X) == widths


def test_a_gated_subclass_is_not_taken_for_its_base() -> None:
    model = one(FlippedConv(8, 8, 1))
    assert "flip" in find_widths(model, X).fixed["one"]
    attach_gates(model, find_widths(model, X), "weight")
    nn.utils.parametrize.register_parametrization(model.one, "weight", nn.Identity())
    assert "one" not in find_widths(model, X)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "flipped": (lambda: one(FlippedConv(8, 8, 1)), "conv2d"),
    "two weights of one module": (
        lambda: between(
            lambda m, x: F.conv2d(F.conv2d(x, m.first), m.second),
            first=nn.Parameter(torch.randn(8, 8, 1, 1)),
            second=nn.Parameter(torch.randn(8, 8, 1, 1)),
        ),
        "is given 'first', one of several weights of a module",
    ),
    "layer norm of a number": (
        lambda: between(lambda m, x: F.layer_norm(x.transpose(1, 3), (8,)).transpose(1, 3)),
        "fixes the number of channels",
    ),
    "groups of a number": (
        lambda: between(
            lambda m, x: F.conv2d(x, m.weight, None, 1, 1, 1, 8),
            weight=nn.Parameter(torch.randn(8, 1, 3, 3)),
        ),
        "fixes the number of groups",
    ),
    "one weight to write and to read by": (
        lambda: between(lambda m, x: F.conv_transpose2d(m.one(x), m.one.weight), one=conv(8, 8)),
        "one.weight is both what writes them and what reads them",
    ),
    "convolution over channels": (
        lambda: between(
            lambda m, x: F.conv2d(x.transpose(1, 3), m.weight).transpose(1, 3),
            weight=nn.Parameter(torch.randn(8, 8, 1, 1)),
        ),
        "works on channels as if they were space",
    ),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_computes_something_else_is_refused(build: Callable[[], nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    model = build()
    widths = find_widths(model, X)
    if reason != "conv2d":  # of the flipped one the input is right
        assert reason in widths.fixed["stem"]
    free = set(widths)
    fix_wrong_widths(model, widths)
    assert set(widths) == free


def test_the_trunk_of_convnext_is_free() -> None:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    torch.manual_seed(0)
    model = ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    widths = discover(model, x, check=True)
    assert widths.sizes() == {
        **{"features.0.0": 8, "features.1.0.block.3": 32, "features.2.1": 16},
        **{f"features.3.{i}.block.3": 64 for i in range(2)},
    }
    assert widths["features.0.0"].mixed and widths["features.1.0.block.3"].mixed is None
