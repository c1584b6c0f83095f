"""Layers as libraries write them: norms with their activation, and what is done in one mode alone."""

import copy
import pickle
import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from elastic.dynamic import attach_modules, make_skipping
from elastic.dynamic.modules import iterate_modules
from elastic.dynamic.sites import find_sites
from elastic.errors import StructureError
from elastic.widths.discovery import discover
from elastic.widths.tracing import list_graphs, sync_traced, trace_both_modes
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


class GroupNormWithActivation(nn.GroupNorm):
    """Normalise groups by the function, and then rectify."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps))


class GroupNormInFloats(nn.GroupNorm):
    """Normalise groups in single precision, whatever comes."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).type(input.dtype)


class SynchronizedNorm(nn.modules.batchnorm._BatchNorm):
    """Normalise as many segmentation networks do, which say of no dimensions that they are wanted."""

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        momentum = 0.0 if self.momentum is None else self.momentum
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, momentum, self.eps)


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


class Generator(nn.Module):
    """Make maps of what a linear layer writes for each place: each of them is several of its kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.last = nn.Linear(6, 5), nn.Linear(5, 8 * 16), nn.Conv2d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(F.relu(self.first(x)))
        return self.last(F.relu(y.flatten(0, 1).view(len(x) * x.shape[1], -1, 4, 4)))


@pytest.mark.parametrize("name", ["code", "graph"])
def test_a_part_by_a_name_of_torch_fx_is_named(name: str) -> None:
    net = nn.Sequential()
    net.add_module(name, conv(3, 8, 3))
    net.add_module("last", head(8))
    assert discover(net, X, check=True).sizes() == {name: 8}
    with pytest.raises(StructureError, match=f"torch.fx has '{name}' for itself: give that part of the"):
        attach_modules(net, discover(net, X))


def test_kernels_that_are_one_map_are_not_switched() -> None:
    net, x = Generator(), torch.randn(2, 7, 6)
    widths = discover(net, x, check=True)
    assert widths["wide"].size == 8
    with pytest.raises(StructureError, match="last reads several of its kernels as one map"):
        attach_modules(net, widths, "wide")


@pytest.mark.parametrize("kind", [SynchronizedNorm, nn.BatchNorm2d])
def test_a_norm_whose_class_says_nothing_of_dimensions_is_a_layer(kind: Any) -> None:
    torch.manual_seed(0)
    layers = [conv(3, 8, 3), kind(8), nn.ReLU(), conv(8, 6, 3), kind(6), nn.ReLU(), head(6)]
    net = randomised(nn.Sequential(*layers)).eval()
    dynamic = attach_modules(net, discover(net, X)).eval()
    torch.testing.assert_close(dynamic(X), make_skipping(dynamic)(X), rtol=1e-4, atol=1e-4)
    assert len(list(find_sites(trace_both_modes(net, X.to("meta")), discover(net, X)))) == 2


@pytest.mark.parametrize("kind", [GroupNormWithActivation, GroupNormInFloats])
def test_a_group_norm_of_ones_own_is_a_layer(kind: Any) -> None:
    torch.manual_seed(0)
    layers = [conv(3, 8, 3), kind(4, 8), nn.ReLU(), conv(8, 6, 3), kind(2, 6), nn.ReLU(), head(6)]
    net = randomised(nn.Sequential(*layers)).eval()
    dynamic = gated(net, X)
    torch.testing.assert_close(dynamic(X), make_skipping(dynamic)(X), rtol=1e-4, atol=1e-4)
    modules = list(iterate_modules(dynamic))
    assert [module.site.together for module in modules] == [2, 3]
    assert all(0 < module.active_BK.mean() < 1 for module in modules)


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


class Outputs(NamedTuple):
    logits: Tensor
    auxiliary: Tensor | None


class Auxiliary(nn.Module):
    """Look at maps through another head in training, as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.norm, self.two = conv(3, 6), conv(6, 8, 3), nn.BatchNorm2d(8), conv(8, 6, 3)
        self.early, self.early_norm, self.early_head = conv(8, 4), nn.BatchNorm2d(4), head(4)
        self.decode = conv(6, 4)
        self.register_buffer("scale", torch.tensor(2.0))
        self.head = head(6)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.one(self.stem(x))).relu()
        logits = self.head(self.two(y).relu())
        if not self.training:
            return logits
        return Outputs(logits, self.early_head(self.early_norm(self.early(y)).relu()) * self.scale)


class Decoding(Auxiliary):
    """Make boxes of maps in evaluation alone, by layers and numbers of its own, as detectors do."""

    def forward(self, x: Tensor) -> Any:
        y = self.two(self.norm(self.one(self.stem(x))).relu())
        if self.training:
            return [y, y * torch.tensor(3.0)]
        return torch.cat([self.decode(y).sigmoid() * torch.tensor(0.5), y], 1), [y]


def list_outputs(networks: Iterable[nn.Module], training: bool) -> list[list[Tensor]]:
    """The tensors that each gives in a mode, from one state of the random numbers."""
    outputs = []
    for network in networks:
        torch.manual_seed(1)
        outputs.append(tree_leaves(network.train(training)(X)))
    return outputs


BY_MODE: dict[str, Callable[[], nn.Module]] = {
    **{
        step.__name__: partial(make_stepping, step)
        for step in (drop_branches, drop_in_place, add_noise, change_and_give_back)
    },
    **{kind.__name__: partial(make_net, kind()) for kind in (DropPath, Noise)},
    **{kind.__name__: lambda kind=kind: randomised(kind()) for kind in (Auxiliary, Decoding)},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("make", BY_MODE.values(), ids=BY_MODE)
def test_a_network_may_be_another_one_in_training(make: Callable[[], nn.Module]) -> None:
    net = make()
    expected = copy.deepcopy(net)
    dynamic = attach_modules(net, discover(net, X))
    copied = copy.deepcopy(dynamic)
    for training in (True, False, True, False):
        ours, theirs, outputs = list_outputs([dynamic, copied, expected], training)
        assert len(ours) == len(theirs) == len(outputs)
        assert all(map(torch.equal, ours, outputs)) and all(map(torch.equal, theirs, outputs))


def test_what_a_forward_asks_for_draws_nothing() -> None:
    """It asks for the shape of what numbers are drawn for, in each of four steps."""
    net = make_stepping(lambda x, training: x * x.new_empty(len(x)).bernoulli_()[:, None, None, None])
    (graph,) = list_graphs(trace_both_modes(net, X.to("meta")))
    assert len(graph.find_nodes(op="call_method", target="bernoulli_")) == 4


def test_it_is_pickled_with_both_graphs() -> None:
    dynamic = attach_modules(net := Auxiliary(), discover(net, X))
    again = pickle.loads(pickle.dumps(dynamic))  # noqa: S301
    for training in (True, False):
        assert all(map(torch.equal, *list_outputs([dynamic, again], training)))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("make", BY_MODE.values(), ids=BY_MODE)
def test_it_is_skipped_as_in_evaluation(make: Callable[[], nn.Module], sets: int) -> None:
    dynamic = gated(make(), X, sets=sets)
    skipping = make_skipping(dynamic, method="stock")
    for ours, theirs in zip(tree_leaves(skipping(X)), tree_leaves(dynamic(X)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not any("early" in name for name, _ in skipping.named_modules())


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


class CausalConvolution(nn.Conv1d):
    """See the past alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Called3d(nn.Conv3d):
    """Give one number for all dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.weight, self.bias, padding=1)


@pytest.mark.parametrize(("kind", "dimensions"), [(CausalConvolution, 1), (Called3d, 3)])
def test_a_convolution_of_other_dimensions_is_a_layer(kind: Any, dimensions: int) -> None:
    torch.manual_seed(0)
    plain = type(kind(1, 1, 1)).__mro__[1]
    one = kind(6, 8, 3, **({"padding": 1} if dimensions == 3 else {}))
    net = Net(
        lambda m, x: m.two(F.relu(m.one(m.stem(x)))).flatten(2).mean(2),
        **dict(stem=plain(3, 6, 1), one=one, two=plain(8, 5, 1)),
    )
    randomised(net)
    x = torch.randn(2, 3, *[6] * dimensions)
    widths = discover(net, x)
    traced = trace_both_modes(net, *widths.example)
    assert "one" in [site.writer for site in find_sites(traced, widths)]
    assert torch.equal(traced(x), net(x))


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


class OtherNorm(nn.BatchNorm2d):
    """Be torch's own layer in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        eps, statistics = self.eps * (1 if self.training else 2), (self.running_mean, self.running_var)
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, eps)


def test_a_layer_that_is_another_one_by_mode_is_named() -> None:
    layers = dict(one=conv(3, 6), norm=OtherNorm(6), two=conv(6, 8), head=head(8))
    net = Net(lambda m, x: m.head(m.two(m.norm(m.one(x)).relu())), **layers)
    with pytest.raises(StructureError, match=r"^'norm' is another layer in training than in evaluation"):
        attach_modules(net, discover(net, X))


def run_twice_in_training(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.one(m.stem(x)))
    output: Tensor = m.head(m.two((y + m.one(m.stem(x)) if m.training else y).relu()))
    return output


def read_before_the_norm_in_training(m: Any, x: Tensor) -> Tensor:
    y = m.one(m.stem(x))
    z = m.two(m.norm(y).relu())
    output: Tensor = m.head(z + m.two(y) if m.training else z)
    return output


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (run_twice_in_training, "one is used 2 times in training"),
        (read_before_the_norm_in_training, "one has a norm right behind it in one mode alone"),
    ],
)
def test_kernels_are_switched_where_both_modes_allow_it(forward: Any, reason: str) -> None:
    layers = dict(stem=conv(3, 6, 3), one=conv(6, 8, 3), norm=nn.BatchNorm2d(8), two=conv(8, 6, 3))
    net = randomised(Net(forward, **layers, head=head(6)))
    with pytest.raises(StructureError, match=reason):
        attach_modules(net, discover(net, X), ["one"])
    assert "one" not in attach_modules(net, discover(net, X)).kams


def draw_by_python(x: Tensor) -> Tensor:
    return x * random.random()


def draw_by_numpy(x: Tensor) -> Tensor:
    return x * float(np.random.rand())


def draw_by_torch(x: Tensor) -> Tensor:
    return x * torch.empty(8, 8).geometric_(0.5)


@pytest.mark.parametrize("draw", [draw_by_python, draw_by_numpy, draw_by_torch])
def test_numbers_that_would_be_drawn_once_for_all_are_refused(draw: Callable[[Tensor], Tensor]) -> None:
    net = make_stepping(lambda x, training: draw(x) if training else x)
    with pytest.raises(StructureError, match=r"draws numbers .* draw them by torch.rand"):
        attach_modules(net, discover(net, X))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(()),
        lambda: torch.randint(3, (8, 8)),
        lambda: torch.empty(1, 6, 1, 1).bernoulli_(0.5),
        lambda: torch.full((6, 1, 1), 0.5).bernoulli(),
        lambda: torch.rand(1).item(),
    ],
)
def test_numbers_of_one_shape_are_drawn_each_time(draw: Callable[[], Any]) -> None:
    net = make_stepping(lambda x, training: x * draw() if training else x)
    dynamic = attach_modules(net, discover(net, X)).train()
    (ours,), (theirs,) = list_outputs([dynamic, net], training=True)
    assert torch.equal(ours, theirs) and not torch.equal(dynamic(X), ours)
