"""Linear layers that are applied to each position of maps, as ConvNeXt expands channels by."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.loss import ActivationCost
from elastic.dynamic.modules import iterate_modules
from elastic.dynamic.saliency import Saliency
from elastic.dynamic.skipping import list_methods, make_masked, make_skipping
from elastic.dynamic.skipping.expansion import ActiveExpansion
from elastic.errors import StructureError
from elastic.measure.counts import count_macs
from elastic.widths.discovery import discover
from tests.elastic.dynamic.gated import gated
from tests.elastic.zoo import randomised

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Expanding(nn.Module):
    """A block whose channels lie last, expanded and projected by linear layers."""

    def __init__(self, between: Callable[[Tensor], Tensor] = F.gelu, bias: bool = True) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 10, bias), nn.Linear(10, 6, bias)
        self.between, self.head = between, nn.Linear(6, 4)

    def mix(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.mix(self.norm(x))
        return self.head(x.mean((1, 2)))  # type: ignore[no-any-return]


class TwoReaders(Expanding):
    def mix(self, x: Tensor) -> Tensor:
        y = F.relu(self.up(x))
        return self.down(y) + self.down2(y)  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.down2 = nn.Linear(10, 6)


class GatedProduct(Expanding):
    def mix(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.gate(x).sigmoid())  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 10)


class Shifted(nn.Module):
    """A squared ReLU, scaled and shifted (StarReLU, arXiv 2210.13452)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.full(shape, -0.4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) ** 2 + self.shift


class Tokens(Expanding):
    """One dimension of positions."""

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x.flatten(1, 2)).view(x.shape)


NETS: dict[str, Callable[[], nn.Module]] = {
    "gelu": Expanding,
    "no bias": partial(Expanding, nn.Hardswish(), bias=False),
    "arguments": partial(Expanding, partial(F.gelu, approximate="tanh")),
    "several functions": partial(Expanding, lambda y: F.leaky_relu(torch.tanh(y), 0.3)),
    "in place": partial(Expanding, nn.ReLU(inplace=True)),
    "none": partial(Expanding, nn.Identity()),
    "not of each entry": partial(Expanding, lambda y: y * y.sigmoid()),
    "constants": partial(Expanding, lambda y: 1 - torch.sigmoid(y).exp()),
    "parameters": lambda: Expanding(Shifted(1)),
    "parameters of each channel": lambda: Expanding(Shifted(10)),
    "two readers": TwoReaders,
    "a product": GatedProduct,
    "tokens": Tokens,
    "convnext": lambda: ConvNeXt([CNBlockConfig(6, 8, 1), CNBlockConfig(8, None, 1)], num_classes=4),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(NETS[name]()).eval()


@pytest.mark.sampled(16)
@pytest.mark.parametrize("method", [*list_methods(), "masked"])
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_skipping_says_what_masking_says(name: str, method: Any) -> None:
    net = gated(make(name), X)
    fast = make_masked(net) if method == "masked" else make_skipping(net, method=method)
    for x in (X, X.flip(0), X[:1]):
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    (first, *_) = iterate_modules(net)
    assert 0 < first.active_BK.mean() < 1
    is_alone = name not in ("not of each entry", "parameters of each channel", "two readers", "a product")
    expansions = [layer for layer in fast.modules() if isinstance(layer, ActiveExpansion)]
    assert bool(expansions) == (is_alone and method not in ("dense", "masked"))


@torch.no_grad()
def test_hooks_are_called() -> None:
    net = gated(make("gelu"), X)
    expected = net(X)
    for layer in ("up", "down"):
        handle = net.get_submodule(layer).register_forward_hook(lambda layer, inputs, y: y * 2 + 1)
        assert not torch.allclose(net(X), expected)
        torch.testing.assert_close(make_skipping(net)(X), net(X), rtol=1e-4, atol=1e-5)
        handle.remove()


@torch.no_grad()
def test_what_is_off_is_not_read() -> None:
    """Each image as by the network whose weights are zero that read what is off for it."""
    plain = make("gelu")
    net = gated(copy.deepcopy(plain), X, activation="straight_through")
    (module,) = iterate_modules(net)
    output, active_BK = net(X), module.active_BK
    assert module.site.writer == "up" and 0 < active_BK.mean() < 1 and len(active_BK.unique(dim=0)) > 1
    for x, active_K, y in zip(X, active_BK, output, strict=True):
        cut = copy.deepcopy(plain)
        cut.get_submodule("down").weight.data[:, active_K == 0] = 0
        torch.testing.assert_close(y, cut(x[None])[0])


@torch.no_grad()
def test_what_is_off_is_not_computed() -> None:
    net = gated(make("gelu"), X)
    fast = make_skipping(net)
    net(X)
    (module,), pixels = list(iterate_modules(net)), 8 * 8
    with FlopCounterMode(display=False) as counter:
        fast(X)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.addmm]
    scores, head = 3 * 6 * 10, 3 * 6 * 4
    assert products == 2 * (scores + head + pixels * 12 * int(module.active_BK.sum()))


@torch.no_grad()
def test_macs_are_those_of_what_is_on() -> None:
    net = gated(make("gelu"), X)
    cost = ActivationCost(net, X)
    net(X)
    (module,), pixels = list(iterate_modules(net)), 8 * 8
    fixed = pixels * 27 * 6 + 6 * 4
    torch.testing.assert_close(cost.macs_B(), fixed + 6 * 10 + pixels * 12 * module.active_BK.sum(1))
    assert cost.dense_macs == fixed + pixels * 12 * 10 == count_macs(make("gelu"), X[:1])


@torch.no_grad()
def test_saliency_is_the_norm_of_a_map_times_that_of_the_weights_that_read_it() -> None:
    net = make("gelu")
    dynamic = attach_modules(net, discover(net, X)).eval()
    saliency = Saliency(dynamic)
    saliency.fit([X])
    dynamic(X)
    (module,) = iterate_modules(dynamic)
    maps_BHWK = net.up(net.norm(net.stem(X).permute(0, 2, 3, 1)))  # type: ignore[operator]
    product_BK = maps_BHWK.flatten(1, 2).norm(dim=1) * net.down.weight.norm(dim=0)  # type: ignore[operator, union-attr]
    expected_BK = product_BK / product_BK.mean(1, keepdim=True)
    torch.testing.assert_close(saliency.measure(module), expected_BK)


def test_modules_learn_and_are_those_of_all_blocks() -> None:
    net = make("convnext")
    dynamic = attach_modules(net, discover(net, X), activation="ramp").train()
    modules = list(iterate_modules(dynamic))
    assert {m.site.writer for m in modules} == {"features.1.0.block.3", "features.3.0.block.3"}
    dynamic(X.repeat(2, 1, 4, 4)).square().sum().backward()
    assert all(head.linear.bias.grad.any() for m in modules for head in m.iterate_heads())  # type: ignore[union-attr]


class Windows(Expanding):
    """Layers work on quarters of images, one after the other."""

    def mix(self, x: Tensor) -> Tensor:
        windows = x.view(x.shape[0], 2, 4, 2, 4, x.shape[3]).transpose(2, 3).reshape(-1, 4, 4, x.shape[3])
        windows = super().mix(windows).view(x.shape[0], 2, 2, 4, 4, x.shape[3])
        return windows.transpose(2, 3).reshape(x.shape)


class Classifier(Expanding):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.stem(x).relu().mean((2, 3))))  # type: ignore[no-any-return]


class Convolved(Expanding):
    """A depthwise convolution in between, whose channels lie elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)

    def mix(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.up(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.down(F.gelu(y))  # type: ignore[no-any-return]


class Joined(Expanding):
    """Maps lie below each other, not side by side: what reads them reads each layer's in some rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up2 = nn.Linear(6, 10)

    def mix(self, x: Tensor) -> Tensor:
        return self.down(torch.cat([self.up(x), self.up2(x)], 1))[:, :8]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Windows, r"up \(Linear\) reads no samples of several positions"),
        (Classifier, r"up \(Linear\) reads no samples of several positions"),
        (
            Convolved,
            r"permute\(0, 3, 1, 2\) in the model.s forward does more with its maps than to read them",
        ),
        (Joined, "several layers write its maps, up and up2"),
        (
            partial(Expanding, lambda y: 1 / (1 + y.square())),
            r"truediv\(…\) in the model.s forward does more with its maps than to read them",
        ),
    ],
)
def test_others_are_refused(kind: Callable[[], nn.Module], message: str) -> None:
    net = kind()
    with pytest.raises(StructureError, match=f"'up' cannot be switched off: {message}"):
        attach_modules(net, discover(net, X), ["up"])
