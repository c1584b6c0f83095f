"""Layers as libraries write them: norms with their activation, and what acts in training alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.dynamic import attach_modules, make_skipping
from elastic.dynamic.sites import find_sites
from elastic.errors import StructureError
from elastic.widths.discovery import discover
from elastic.widths.tracing import acts_in_training_alone, sync_traced, trace_both_modes
from tests.elastic.dynamic.gated import gated
from tests.elastic.zoo import Net, conv, head, randomised

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class NormWithActivation(nn.BatchNorm2d):
    """Normalise by the function, as a forward of one's own has to, and then rectify."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4, f"4 dimensions are needed, not {x.ndim}"
        if self.training:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var
        y = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        return F.relu(y)


class SameConvolution(nn.Conv2d):
    """Pad by what the size of the image needs, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        needed = [
            max((-(-n // s) - 1) * s + k - n, 0)
            for n, s, k in zip(x.shape[-2:], self.stride, self.kernel_size, strict=True)
        ]
        x = F.pad(x, [pad for n in reversed(needed) for pad in (n // 2, n - n // 2)])
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Grouped(nn.Conv2d):
    """Call its convolution with numbers other than its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, 2, 2)


class DropPath(nn.Module):
    """Leave a branch out for some samples (arXiv 1603.09382)."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class Noise(nn.Module):
    """Add noise in training, which makes something of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class SwishInPlace(nn.Module):
    """Change what it is given, and give that back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.sigmoid())


class Clipping(nn.Module):
    """Give back all but large numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-6, 6)


def run(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.stem(x))
    y = y + m.drop(m.two(m.inner(m.one(y))))
    output: Tensor = m.head(y)
    return output


def make_net(drop: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    layers = dict(stem=conv(3, 6, 3), norm=NormWithActivation(6), one=conv(6, 8, 3), two=conv(8, 6, 3))
    net = Net(run, **layers, inner=NormWithActivation(8), drop=drop or nn.Identity(), head=head(6))
    return randomised(net)


def test_a_norm_with_its_activation_is_a_layer() -> None:
    net = make_net()
    widths = discover(net, X)
    traced = trace_both_modes(net, *widths.example)
    assert [site.writer for site in find_sites(traced, widths)] == ["one"]
    assert not traced.graph.find_nodes(op="call_function", target=F.batch_norm)
    assert type(net.norm) is NormWithActivation


@pytest.mark.parametrize("is_frozen", [False, True])
def test_it_trains_as_in_the_network(is_frozen: bool) -> None:
    net = make_net().train()
    same = copy.deepcopy(net)
    dynamic = attach_modules(net, discover(net, X))
    if is_frozen:
        net.norm.eval()
        same.norm.eval()
    sync_traced(dynamic, net, training=True)
    torch.testing.assert_close(dynamic(X), same(X), rtol=0, atol=0)
    dynamic(X).sum().backward()
    same(X).sum().backward()
    for (name, ours), theirs in zip(net.named_buffers(), same.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(net.norm.weight.grad, same.norm.weight.grad)


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("drop", [None, DropPath()], ids=["alone", "behind a branch"])
def test_skipping_says_what_masking_says(drop: nn.Module | None, sets: int) -> None:
    dynamic = gated(make_net(drop), X, sets=sets)
    skipping = make_skipping(dynamic, method="stock")
    torch.testing.assert_close(skipping(X), dynamic(X), rtol=1e-4, atol=1e-4)
    assert not any(type(layer) in (NormWithActivation, DropPath) for layer in skipping.modules())


def test_what_acts_in_training_alone_does_so_behind_modules() -> None:
    net = make_net(DropPath())
    dynamic = attach_modules(net, discover(net, X))
    for network in (dynamic, net):
        network.train()
        torch.manual_seed(0)
        with torch.random.fork_rng():
            first = network(X)
            assert not torch.equal(network(X), first)
    torch.testing.assert_close(dynamic.eval()(X), net.eval()(X))


def drop_branches(x: Tensor, training: bool, rate: float = 0.5) -> Tensor:
    """Drop branches as EfficientNets do that are no modules for it: by a function, which asks for a shape."""
    if not training:
        return x
    kept = 1 - rate + torch.rand([x.shape[0], 1] + [1] * (len(x.shape) - 2), dtype=x.dtype, device=x.device)
    return x / (1 - rate) * torch.floor(kept)


def drop_in_place(x: Tensor, training: bool) -> Tensor:
    return x.clone().mul_(torch.rand(x.shape[0], 1, 1, 1)) if training else x


def add_noise(x: Tensor, training: bool) -> Tensor:
    return x + torch.rand_like(x) if training else x


def change_and_give_back(x: Tensor, training: bool) -> Tensor:
    if training:
        x.mul_(0.5)
    return x


Step = Callable[[Tensor, bool], Tensor]


def make_stepping(step: Step) -> nn.Module:
    """Take a step of training once, twice in one sum, and where what it makes is read twice."""
    torch.manual_seed(0)
    layers = {name: conv(6, 6, 3) for name in ("one", "two", "three", "four")}

    def run_steps(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).relu()
        y = step(m.two(F.relu(m.one(y))), m.training) + y
        y = step(m.three(y), m.training) + step(m.four(y), m.training)
        z = step(y, m.training)
        return m.head(z * torch.sigmoid(z))  # type: ignore[no-any-return]

    return randomised(Net(run_steps, stem=conv(3, 6, 3), **layers, head=head(6)))


@pytest.mark.parametrize("act", [SwishInPlace(), Clipping()], ids=lambda act: type(act).__name__)
def test_an_activation_of_ones_own_is_not_left_out(act: nn.Module) -> None:
    dynamic = gated(make_net(nn.Sequential(DropPath(), act)), X)
    skipping = make_skipping(dynamic, method="stock")
    torch.testing.assert_close(skipping(10 * X), dynamic(10 * X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [drop_branches, drop_in_place])
def test_what_is_done_in_training_alone_is_done_there(step: Step) -> None:
    net = make_stepping(step)
    dynamic = attach_modules(net, discover(net, X))
    for training in (True, False, True):
        outputs = []
        for network in (dynamic.train(training), net.train(training)):
            torch.manual_seed(1)
            outputs.append(network(X))
        assert torch.equal(*outputs)
    gates = gated(make_stepping(step), X)
    skipping = make_skipping(gates, method="stock")
    torch.testing.assert_close(skipping(X), gates(X), rtol=1e-4, atol=1e-4)
    assert not any("InTraining" in type(layer).__name__ for layer in skipping.modules())


@pytest.mark.parametrize("step", [add_noise, change_and_give_back])
def test_steps_in_training_that_do_more_are_refused(step: Step) -> None:
    """They make something of zeros, or change what is read in their stead."""
    net = make_stepping(step)
    with pytest.raises(StructureError, match="is another network in training than in evaluation"):
        attach_modules(net, discover(net, X))


def make_padded(kind: type[nn.Conv2d] = SameConvolution, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    one = kind(6, 8, 3, **options)
    layers = dict(stem=conv(3, 6, 3), one=one, norm=nn.BatchNorm2d(8), two=conv(8, 6, 3))
    net = Net(lambda m, x: m.head(m.two(F.relu(m.norm(m.one(m.stem(x)))))), **layers, head=head(6))
    return randomised(net)


def test_a_convolution_that_pads_as_it_likes_is_a_layer() -> None:
    net = make_padded(stride=2)
    widths = discover(net, X)
    traced = trace_both_modes(net, *widths.example)
    assert "one" in [site.writer for site in find_sites(traced, widths)]
    assert not traced.graph.find_nodes(op="call_function", target=F.conv2d)
    assert torch.equal(traced(X), net(X))
    dynamic = gated(net, X)
    torch.testing.assert_close(make_skipping(dynamic, method="stock")(X), dynamic(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Grouped, {}), (SameConvolution, {"padding_mode": "circular"})],
    ids=["other numbers", "other padding"],
)
def test_a_call_that_is_not_the_layers_stays_a_call(kind: type[nn.Conv2d], options: dict[str, Any]) -> None:
    net = make_padded(kind, **options)
    traced = trace_both_modes(net, *discover(net, X).example)
    assert traced.graph.find_nodes(op="call_function", target=F.conv2d)
    assert torch.equal(traced(X), net(X))


def test_what_does_more_than_that_is_refused() -> None:
    net = make_net(Noise())
    with pytest.raises(StructureError, match=r"another network in training .*give back what they are given"):
        attach_modules(net, discover(net, X))


ALIKE = [Noise(), nn.Dropout(), NormWithActivation(8), SwishInPlace(), Clipping()]


@pytest.mark.parametrize(
    ("module", "does"),
    [(DropPath(), True), *((module, False) for module in ALIKE)],
    ids=lambda value: type(value).__name__,
)
def test_what_acts_in_training_alone_is_known_by_what_it_does(module: nn.Module, does: bool) -> None:
    state = torch.get_rng_state()
    module.eval()
    assert acts_in_training_alone(module) is does
    assert not module.training and torch.equal(torch.get_rng_state(), state)
