"""Kernel activation modules: where they go, what they shut, how they learn, what they cost."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from elastic.dynamic.activations import Activation, compute_gates
from elastic.dynamic.attaching import attach_modules, measure_reading_weights
from elastic.dynamic.loss import ActivationCost, ActivationLoss
from elastic.dynamic.modules import WITHIN, KernelActivation, iterate_modules, select_set
from elastic.dynamic.sites import Reader, Site
from elastic.dynamic.skipping import make_masked, make_skipping
from elastic.errors import OptionError, StructureError
from elastic.measure.counts import count_macs
from elastic.models import convnet, resnet20, vgg16_bn
from elastic.pruning.folding import fold_gates
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover
from tests.elastic.dynamic.gated import case_or_none, gated
from tests.elastic.zoo import CASES, Net, conv, head, randomised

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
PROJECT = Reader("project", 0, 6, 6)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=4)
def test_what_is_off_is_not_read(name: str, seed: int) -> None:
    """The network, with those columns of its weights zeroed that read what the modules have switched off."""
    case = CASES[name]
    net = case_or_none(case, seed, "straight_through")
    if net is None:
        return
    plain, x = fold_gates(case.model()).eval(), case.example()[:1]
    with torch.no_grad():
        found = net(x)
        for module in iterate_modules(net):
            off_K = module.active_BK[0] == 0
            for reader in module.site.readers:
                layer: Any = plain.get_submodule(reader.path)
                off_N = torch.zeros(reader.channels, dtype=torch.bool)
                off_N[reader.begin : reader.end] = off_K.repeat_interleave(
                    (reader.end - reader.begin) // len(off_K)
                )
                if getattr(layer, "transposed", False):
                    layer.weight[off_N] = 0
                    continue
                groups = getattr(layer, "groups", 1)
                for weight, off in zip(layer.weight.chunk(groups), off_N.chunk(groups), strict=True):
                    weight[:, off] = 0
        torch.testing.assert_close(found, plain(x))


class Dropping(nn.Module):
    """Does by `self.training` what torch.fx takes for constants."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.depth = StochasticDepth(0.5, "row")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.one(x).relu(), 0.5, self.training)
        x = self.depth(self.two(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Otherwise(Dropping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2 if self.training else super().forward(x)


class OtherNumbers(Dropping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.5 if self.training else 0.0, True)


class OneMore(Dropping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y * torch.rand(()) if self.training else y


class Remembering(Dropping):
    """Makes a tensor in its forward, and keeps what it has seen."""

    seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = super().forward(x) * torch.tensor([0.5, 2.0, 1.0, 3.0])
        return self.seen


class OtherTensors(Dropping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (torch.tensor(0.5) if self.training else torch.tensor(1.0))


class Optional(Dropping):
    """May be given more than an image."""

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, *, features: bool = False, scale: float = 2.0
    ) -> Any:
        y = self.one(x).relu()
        if mask is not None:
            y = y * mask
        logits = self.head(self.two(y).mean((2, 3))) * scale
        return (logits, y) if features else logits


class PassedOn(Optional):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [Optional, PassedOn])
def test_what_a_forward_may_be_given_is_what_it_is_by_default(kind: type[Optional]) -> None:
    net, x = kind().eval(), torch.randn(2, 1, 8, 8)
    widths = discover(net, x, check=True)
    assert widths.sizes() == {"one": 8, "two": 8}
    found = attach_modules(net, widths).eval()
    with torch.no_grad():
        for way in (found, make_skipping(found), make_skipping(found, [x]), make_masked(found)):
            assert torch.allclose(way(x), net(x), atol=1e-6)
    if kind is Optional:
        assert torch.equal(found(x, None, features=False, scale=2.0), found(x))
        for name, value in {"mask": x, "features": True, "scale": 1.0}.items():
            with pytest.raises(StructureError, match=f"traced with {name}=.*, as it is by default: leave"):
                found(x, **{name: value})


class Filtering(Dropping):
    """Filters each of its maps alone, as if it were an image."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x).relu()
        images = y.reshape(y.shape[0] * y.shape[1], 1, *y.shape[2:])
        return self.head(self.two(self.filter(images).reshape(y.shape)).mean((2, 3)))  # type: ignore[no-any-return]


def test_what_reads_maps_as_images_is_no_reader_of_channels() -> None:
    net, x = Filtering(), torch.randn(2, 1, 8, 8)
    widths = discover(net, x)
    with pytest.raises(StructureError, match="'one' cannot be switched off: filter does not read them as"):
        attach_modules(net, widths, ["one"])
    (module,) = iterate_modules(attach_modules(net, widths))
    assert module.site.writer == "two"


def test_attaching_leaves_nothing_in_the_network() -> None:
    net, x = Remembering().eval(), torch.randn(2, 1, 8, 8)
    expected, names = net(x), {*vars(net)}
    found = attach_modules(net, discover(net, x))
    assert {*vars(net)} == names and net.seen is expected
    with torch.no_grad():
        assert torch.allclose(found.eval()(x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [Dropping, Otherwise, OtherNumbers, OtherTensors, OneMore])
@pytest.mark.parametrize("traced_in_training", [True, False])
def test_what_is_random_in_training_is_so_there_alone(traced_in_training: bool, kind: type[Dropping]) -> None:
    torch.manual_seed(0)
    net, x = kind().train(traced_in_training), torch.randn(8, 1, 8, 8)
    found = attach_modules(net, discover(net, x))
    assert found.training == net.training == traced_in_training
    with torch.no_grad():
        for way in (found, make_skipping(found), make_masked(found)):
            assert torch.allclose(way.eval()(x), net.eval()(x), atol=1e-6)
        found.train()
        assert not torch.equal(found(x), found(x))
        torch.manual_seed(1)
        expected = net.train()(x)
        torch.manual_seed(1)
        assert torch.equal(found(x), expected)


def test_modules_go_where_kernels_have_one_writer() -> None:
    """All of a plain network; in a residual one the widths inside the branches."""
    for build, expected in [(convnet, 4), (vgg16_bn, 13), (resnet20, 9)]:
        net = build(in_channels=3)
        x = torch.zeros(2, 3, 32, 32)
        found = attach_modules(net, discover(net, x))
        assert len(list(iterate_modules(found))) == expected
        assert {*net.state_dict()} <= {*found.state_dict()}, "layers keep their names"
        for path, layer in net.named_modules():
            if not list(layer.children()):
                assert found.get_submodule(path) is layer
    sites = {module.site.writer: module.site.readers for module in iterate_modules(found)}
    assert sites["stage1.0.conv1"] == (Reader("stage1.0.conv2", 0, 16, 16),)


def test_a_depthwise_convolution_follows_its_maps() -> None:
    """What it makes of a map that is off (its bias, its norm's shift) is off, too."""
    layers = {
        "expand": conv(3, 6),
        "depth": conv(6, 6, 3, groups=6),
        "norm": nn.BatchNorm2d(6),
        "project": conv(6, 4),
    }
    net = Net(
        lambda m, x: m.head(m.project(F.relu(m.norm(m.depth(F.relu(m.expand(x))))))), **layers, head=head(4)
    )
    net = gated(randomised(net).eval(), X)
    (module, _) = iterate_modules(net)
    assert module.site == Site("expand", (PROJECT,), ("depth",), "expand")
    seen: list[Tensor] = []
    net.get_submodule("project").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        net(X)
    off_BK = module.active_BK == 0
    assert off_BK.any() and (seen[0][off_BK] == 0).all() and (seen[0][~off_BK] != 0).any()


def squeeze_and_excite(m: Any, x: Tensor) -> Tensor:
    """Weigh each map by what all of them hold (arXiv 1709.01507), behind a depthwise convolution."""
    y = F.relu(m.norm(m.depth(F.relu(m.expand(x)))))
    return m.head(m.project(m.excite(F.relu(m.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid() * y))  # type: ignore[no-any-return]


def weigh(m: Any, x: Tensor) -> Tensor:
    return m.head(m.project(m.scale * m.expand(x).mul_(2.0)))  # type: ignore[no-any-return]


def gate(m: Any, x: Tensor) -> Tensor:
    return m.head(m.project(torch.multiply(torch.tanh(m.expand(x)), m.other(x).sigmoid())))  # type: ignore[no-any-return]


MULTIPLIED: dict[str, tuple[Any, dict[str, Any], tuple[Reader, ...], tuple[str, ...]]] = {
    "by what is squeezed": (
        squeeze_and_excite,
        {"depth": conv(6, 6, 3, groups=6), "norm": nn.BatchNorm2d(6)}
        | {"squeeze": conv(6, 3), "excite": conv(3, 6)},
        (PROJECT, Reader("squeeze", 0, 6, 6)),
        ("depth",),
    ),
    "by a parameter": (weigh, {"scale": nn.Parameter(torch.rand(6, 1, 1) + 0.5)}, (PROJECT,), ()),
    "by another layer's": (gate, {"other": conv(3, 6)}, (PROJECT,), ()),
}


def check_off(
    net: fx.GraphModule, module: KernelActivation, *ways: Callable[[fx.GraphModule], nn.Module]
) -> None:
    """What reads maps that are off is given zeros, and each way of leaving them out says the same."""
    seen: list[Tensor] = []
    hook = net.get_submodule("project").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        expected = net(X)
        off_BK = module.active_BK == 0
        (reader,) = (reader for reader in module.site.readers if reader.path == "project")
        maps_BKHW = seen[0][:, reader.begin : reader.end]
        maps_BKHW = maps_BKHW.reshape(*off_BK.shape, -1)  # they may be flattened
        assert off_BK.any() and (maps_BKHW[off_BK] == 0).all() and (maps_BKHW[~off_BK] != 0).any()
        hook.remove()
        for make in ways:
            torch.testing.assert_close(make(net)(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MULTIPLIED)
def test_maps_that_are_multiplied_are_off_where_a_factor_is(name: str) -> None:
    forward, layers, readers, followers = MULTIPLIED[name]
    net = Net(forward, expand=conv(3, 6), project=conv(6, 4), head=head(4), **copy.deepcopy(layers))
    net = gated(randomised(net).eval(), X)
    found = {module.site.writer: module for module in iterate_modules(net)}["expand"]
    assert {*found.site.readers} == {*readers} and found.site.followers == followers
    check_off(net, found, make_skipping, lambda each: make_skipping(each, [X]), make_masked)


class Swish(torch.autograd.Function):
    """Keep the input alone for the gradient, as implementations do that spare memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        sigmoid = x.sigmoid()
        return gradients[0] * sigmoid * (1 + x * (1 - sigmoid))


class Shift(torch.autograd.Function):
    """Make something of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + 0.1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


LAYERS = [
    *(nn.PReLU(), nn.PReLU(6), nn.RReLU(), nn.Softsign(), nn.Tanhshrink(), nn.Hardshrink(), nn.Softshrink()),
    *(nn.Hardtanh(-0.5, 0.5), nn.Threshold(0.1, 0.0), nn.LPPool2d(2, 2), nn.Upsample(scale_factor=2)),
    *(nn.UpsamplingNearest2d(scale_factor=2), nn.UpsamplingBilinear2d(scale_factor=2), nn.CircularPad2d(1)),
    *(nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.ConstantPad2d(1, 0.0)),
]
FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    *(lambda x: x.clamp(min=0.0), lambda x: torch.clip(x, -1.0, 1.0), lambda x: F.hardtanh(x)),
    *(lambda x: F.pad(x, (1, 1, 1, 1)), lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), lambda x: x / 2),
    *(lambda x: torch.abs(x), lambda x: -x, lambda x: x.square(), lambda x: torch.sin(x), lambda x: x.erf()),
    *(
        lambda x: F.pad(x, (x.shape[-1] % 3, 1)),
        lambda x: F.pad(x, pad=(0, x.shape[-1] % 3), mode="constant"),
    ),
    *(lambda x: F.interpolate(x, scale_factor=2.0), lambda x: x.float(), lambda x: x.clone()),
]
BY_HAND: list[Callable[[Tensor], Tensor]] = [
    *(lambda x: x * torch.sigmoid(x), lambda x: x.sigmoid().mul(x), lambda x: x * torch.tanh(F.softplus(x))),
    *(lambda x: x * F.relu6(x + 3, inplace=True) / 6, lambda x: x.mul_(x.exp() + 1), Swish.apply),
    lambda x: x * x.amax((2, 3))[:, :, None, None].sigmoid().mul_(2),
]
CROPS: list[Callable[[Tensor], Tensor]] = [
    *(lambda x: x[:, :, 1:-1, 1:-1], lambda x: x[..., ::2, :].relu(), lambda x: x[:, :, : x.shape[2] // 2]),
    *(lambda x: x.narrow(2, 1, 3), lambda x: x[:, :, :-1] * x[:, :, 1:]),
]
CONSTANTS: list[Callable[[Tensor], Tensor]] = [
    *(nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid(), nn.LogSigmoid(), nn.Hardtanh(0.1, 1.0)),
    *(nn.Threshold(0.1, 1.0), nn.Hardsigmoid(inplace=True), lambda x: x.clamp(min=0.1), torch.cos),
    *(
        lambda x: x.exp(),
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: torch.rsub(x, 1),
        lambda x: x.relu() ** 2 - 0.1,
    ),
    *(lambda x: x + torch.sigmoid(x), lambda x: (y := x.sigmoid()) - x * y, lambda x: x.sigmoid().add_(1)),
    *(
        lambda x: F.max_pool2d(x.exp(), 2).sigmoid(),
        lambda x: x.sigmoid() * x.exp(),
        lambda x: x * (x + 1) + x,
    ),
    lambda x: F.adaptive_avg_pool2d(x + 1, 1).sigmoid() * (x - 1),
]
OTHERS: list[Callable[[Tensor], Tensor]] = [
    *(nn.ConstantPad2d(1, 1.0), lambda x: F.pad(x, (1, 1, 1, 1), value=1.0), Shift.apply),
    *(
        lambda x: 1 / (1 + x.square()),
        lambda x: x**-1.0,
        lambda x: x.log(),
        lambda x: x + x.mean(1, keepdim=True).exp(),
    ),
    *(lambda x: x[:, :, 0, :, None], lambda x: x[:1].expand(x.shape)),
    *(lambda x: x * F.hardsigmoid(x, inplace=True), lambda x: x * x.flatten(2).exp_().view_as(x)),
    lambda x: x.view(len(x), -1, 2, *x.shape[2:]).sigmoid().flatten(1, 2),
]


def between(make: Callable[[Tensor], Tensor]) -> Net:
    """A network that does something between the convolution that may be switched and its reader."""
    layers: dict[str, Any] = {"expand": conv(3, 6), "project": conv(6, 4), "head": head(4)}
    if isinstance(make, nn.Module):
        layers["make"] = copy.deepcopy(make)
        return randomised(Net(lambda m, x: m.head(m.project(m.make(m.expand(x)))), **layers)).eval()
    return randomised(Net(lambda m, x: m.head(m.project(make(m.expand(x)))), **layers)).eval()


@pytest.mark.sampled(10)
@pytest.mark.parametrize("make", [*LAYERS, *FUNCTIONS, *BY_HAND, *CROPS])
def test_maps_that_are_off_are_so_behind_what_keeps_zeros(make: Callable[[Tensor], Tensor]) -> None:
    net = gated(between(make), X, names=["expand"])
    (found,) = iterate_modules(net)
    check_off(net, found, make_skipping, make_masked)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("make", CONSTANTS)
def test_constants_that_are_made_of_maps_that_are_off_are_off(make: Callable[[Tensor], Tensor]) -> None:
    net = gated(between(make), X, names=["expand"])
    (found,) = iterate_modules(net)
    check_off(net, found, make_skipping, lambda each: make_skipping(each, [X]), make_masked)


class Affine(nn.Module):
    """Scales and shifts behind a squared ReLU (StarReLU, arXiv 2210.13452), in training twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.full((6, 1, 1), 0.4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 if self.training else 1):
            x = self.scale * F.relu(x) ** 2 + self.shift
        return x


def test_parameters_are_added_in_either_mode_to_maps_that_are_off() -> None:
    net = gated(between(Affine()), X, names=["expand"])
    (found,) = iterate_modules(net)
    check_off(net, found, make_skipping, lambda each: make_skipping(each, [X]), make_masked)
    found.is_steady = True
    check_off(net.train(), found)


RESIZED: dict[str, tuple[list[nn.Module], Reader]] = {
    "flattened": (
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 4)],
        Reader("project", 0, 6, 6),
    ),
    "flattened, several positions": (
        [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4)],
        Reader("project", 0, 24, 24),
    ),
    "in a row": (
        [
            nn.Flatten(2),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Conv1d(6, 4, 3),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
        ],
        Reader("project", 0, 6, 6),
    ),
}


@pytest.mark.parametrize("name", RESIZED)
def test_maps_are_off_behind_a_norm_that_has_them_resized(name: str) -> None:
    layers, reader = copy.deepcopy(RESIZED[name])
    names = [
        "project" if isinstance(each, nn.Linear | nn.Conv1d) else str(i) for i, each in enumerate(layers)
    ]
    net = nn.Sequential(
        OrderedDict([("expand", conv(3, 6)), *zip(names, layers, strict=True), ("head", nn.Linear(4, 2))])
    )
    net = gated(randomised(net).eval(), X, names=["expand"])
    (found,) = iterate_modules(net)
    assert found.site.readers == (reader,)
    check_off(net, found, make_skipping, lambda each: make_skipping(each, [X]), make_masked)


@pytest.mark.parametrize("make", OTHERS)
def test_what_makes_something_of_zeros_is_no_way_for_maps_that_are_off(
    make: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(StructureError, match="the kernels of 'expand' cannot be switched off"):
        gated(between(make), X, names=["expand"])


@pytest.mark.parametrize(
    ("norm", "path"),
    [
        (nn.InstanceNorm2d(6), "make"),
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), "make"),
        (nn.GroupNorm(6, 6), "make"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.ReLU()), "make.1"),
    ],
)
def test_a_norm_of_each_map_follows_its_maps(norm: nn.Module, path: str) -> None:
    """What it makes of a map that is off (its shift) is off, too."""
    net = gated(between(norm), X, names=["expand"])
    (found,) = iterate_modules(net)
    assert found.site == Site("expand", (PROJECT,), (path,), "expand")
    check_off(net, found, make_skipping, lambda each: make_skipping(each, [X]), make_masked)


def joined(join: Callable[[Any, Tensor], Tensor], reads: int = 12, **layers: nn.Module) -> Net:
    """A network whose maps lie among others where they are read."""
    layers = {"expand": conv(3, 6), "other": conv(3, 6), "project": conv(reads, 4), "head": head(4)} | layers
    return randomised(Net(lambda m, x: m.head(m.project(join(m, x))), **copy.deepcopy(layers))).eval()


def join_pooled(m: Any, x: Tensor) -> Tensor:
    return F.max_pool2d(torch.cat((m.other(x).relu(), m.expand(x)), dim=-3), 2)


JOINED: dict[str, tuple[Callable[[Any, Tensor], Tensor], int, int]] = {
    "with another layer's": (lambda m, x: torch.cat([m.expand(x).relu(), m.other(x)], 1).relu(), 12, 0),
    "with the input": (lambda m, x: torch.concat([x, m.expand(x).relu()], 1), 9, 3),
    "and pooled": (join_pooled, 12, 6),
    "twice over": (lambda m, x: torch.cat([x, torch.cat([m.other(x), m.expand(x)], 1).relu()], 1), 15, 9),
    "by name": (lambda m, x: torch.cat(dim=1, tensors=[m.other(x), m.expand(x)]), 12, 6),
    "and multiplied": (lambda m, x: (y := torch.cat([m.expand(x), m.other(x)], 1)) * y.sigmoid(), 12, 0),
}


@pytest.mark.parametrize("name", JOINED)
def test_maps_are_off_where_they_lie_among_others(name: str) -> None:
    join, reads, begin = JOINED[name]
    net = gated(joined(join, reads), X)
    found = {module.site.writer: module for module in iterate_modules(net)}["expand"]
    assert found.site == Site("expand", (Reader("project", begin, begin + 6, reads),), (), "expand")
    check_off(net, found, make_skipping, lambda each: make_skipping(each, [X]), make_masked)


def test_kernels_of_groups_are_switched_one_by_one() -> None:
    """Those that are read in groups, and those that read so."""
    layers = {"expand": conv(3, 8), "mid": conv(8, 8, 3, groups=2), "project": conv(8, 4), "head": head(4)}
    net = Net(lambda m, x: m.head(m.project(m.mid(m.expand(x).relu()).relu())), **layers)
    net = gated(randomised(net).eval(), X, names=["expand", "mid"])
    readers = {module.site.writer: module.site.readers for module in iterate_modules(net)}
    assert readers == {"expand": (Reader("mid", 0, 8, 8),), "mid": (Reader("project", 0, 8, 8),)}
    off = {module.site.writer: module for module in iterate_modules(net)}
    check_off(net, off["mid"], make_skipping, make_masked, lambda each: make_skipping(each, [X]))


@pytest.mark.parametrize(
    ("reader", "begin"), [(conv(6, 5, 3), 0), (conv(9, 5, 3), 3), (conv(6, 4, 3, groups=2), 0)]
)
def test_what_reads_a_map_is_worth_what_it_makes_of_a_point_in_it(reader: nn.Conv2d, begin: int) -> None:
    nn.init.normal_(reader.weight)
    site = Site("expand", (Reader("project", begin, begin + 6, reader.in_channels),), ())
    worth_K = measure_reading_weights(Net(lambda m, x: x, expand=conv(3, 6), project=reader), site, 6)
    for k in range(6):
        point = torch.zeros(1, reader.in_channels, 5, 5)
        point[0, begin + k, 2, 2] = 1.0
        made = F.conv2d(point, reader.weight, padding=1, groups=reader.groups)
        torch.testing.assert_close(worth_K[k], made.square().sum())


@pytest.mark.parametrize(
    ("join", "reads", "layers", "message"),
    [
        (
            lambda m, x: torch.cat([y := m.expand(x), y.relu()], 1),
            12,
            {},
            r"cat\(1\) in the model.s forward does more",
        ),
        (lambda m, x: torch.cat([m.expand(x), m.other(x)], 2), 6, {}, "several layers write its maps"),
        (
            lambda m, x: m.norm(torch.cat([m.expand(x), m.other(x)], 1)),
            *(12, {"norm": nn.BatchNorm2d(12)}, r"norm \(BatchNorm2d\) does more with its maps"),
        ),
        (
            lambda m, x: torch.cat([m.expand(x), m.other(x)], 1),
            *(12, {"project": conv(12, 4, groups=2)}, "several layers write its maps"),
        ),
    ],
)
def test_maps_that_are_not_zeros_among_others_are_not_off(
    join: Any, reads: int, layers: dict[str, nn.Module], message: str
) -> None:
    net = joined(join, reads, **layers)
    with pytest.raises(StructureError, match=f"'expand' cannot be switched off: {message}"):
        attach_modules(net, discover(net, X), ["expand"])


def test_of_maps_that_are_multiplied_and_added_those_are_off_that_all_addends_have() -> None:
    layers = {"first": conv(3, 6), "second": conv(3, 6), "project": conv(6, 4), "head": head(4)}
    net = Net(lambda m, x: m.head(m.project(m.first(x) * (y := m.second(x)) + y)), **layers)
    net = gated(randomised(net).eval(), X)
    found = {module.site.writer: module for module in iterate_modules(net)}
    assert "first" not in found
    check_off(net, found["second"], make_skipping, lambda each: make_skipping(each, [X]), make_masked)


def test_a_layer_that_reads_others_maps_too_is_no_reader_of_one() -> None:
    layers = {"one": conv(3, 6), "two": conv(3, 6), "project": conv(6, 4), "head": head(4)}
    net = Net(lambda m, x: m.head(m.project(m.one(x).relu()) + m.project(m.two(x).relu())), **layers)
    with pytest.raises(StructureError, match="several layers write its maps, one and two"):
        attach_modules(net, discover(net, X), ["one"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["conv"],
            "the kernels of 'conv' cannot be switched off: "
            "several layers write its maps, conv and stage1.0.conv2",
        ),
        (["fc"], "width 'fc' cannot change: it is the model's output"),
        (["nothing"], "width 'nothing' cannot change: there is none"),
        ([torch.zeros(3, 3)], "a width is named by a text, not by a Tensor"),
    ],
)
def test_kernels_that_cannot_be_switched_are_refused(names: list[str], message: str) -> None:
    net = resnet20()
    with pytest.raises(StructureError, match=message):
        attach_modules(net, discover(net, X), names)


def test_a_network_without_any_is_refused() -> None:
    net = nn.Sequential(conv(3, 8), nn.GroupNorm(1, 8), nn.ReLU(), head(8))
    with pytest.raises(
        StructureError, match=r"cannot be switched off: 1 .GroupNorm. normalises over its channels"
    ):
        attach_modules(net, discover(net, X))


def test_kernels_whose_maps_are_normalised_together_are_switched_as_one() -> None:
    """Those of a group that is on are normalised as if there were no others."""
    net = randomised(nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), conv(8, 4))).eval()
    dynamic = gated(net, X, activation="hard")
    (module,) = (module for module in iterate_modules(dynamic) if module.site.writer == "0")
    assert module.site.together == 2 and module.get_head().linear.out_features == 4
    with torch.no_grad():
        found = dynamic(X)
        assert torch.equal(module.active_BK[:, ::2], module.active_BK[:, 1::2])
        assert 0 < module.active_BK.mean() < 1
        maps = net[2](net[1](net[0](X))) * module.active_BK[:, :, None, None]
        torch.testing.assert_close(found, net[3](maps))


def test_a_depthwise_convolution_that_is_used_twice_is_no_follower() -> None:
    layers = {"first": conv(3, 6), "depth": conv(6, 6, 3, groups=6), "last": conv(6, 4), "head": head(4)}
    net = Net(lambda m, x: m.head(m.last(m.depth(m.depth(m.first(x)).relu()).relu())), **layers)
    with pytest.raises(StructureError, match="'first' cannot be switched off: depth is used 2 times"):
        attach_modules(net, discover(net, X), ["first"])


def test_a_width_that_is_named_twice_is_switched_once() -> None:
    net = convnet(in_channels=3).eval()
    widths = discover(net, X)
    once, twice, alone = (
        attach_modules(net, widths, names, activation="scale") for names in (["3"], ["3", "3"], "3")
    )
    with torch.no_grad():
        assert torch.equal(twice.eval()(X), once.eval()(X)) and torch.equal(alone.eval()(X), once(X))


def test_there_is_something_to_switch() -> None:
    net = convnet(in_channels=3)
    widths = discover(net, X)
    with pytest.raises(
        StructureError, match="no width is named whose kernels could be switched off: name one"
    ):
        attach_modules(net, widths, [])
    with pytest.raises(
        StructureError, match="has 'kams' already: attach modules to the network that it is made of"
    ):
        attach_modules(attach_modules(net, widths), widths)
    with pytest.raises(OptionError, match="Sequential has no kernel activation modules"):
        ActivationCost(net, X)  # type: ignore[arg-type]


def test_modules_are_of_the_networks_type() -> None:
    net = resnet20().double()
    found = attach_modules(net, discover(net, X.double()))
    assert found(X.double()).dtype == torch.float64


def test_only_the_widths_asked_for() -> None:
    net = resnet20()
    found = attach_modules(net, discover(net, X), ["stage2.1.conv1"])
    assert [module.site.writer for module in iterate_modules(found)] == ["stage2.1.conv1"]


# --- how they learn ---------------------------------------------------------------------------------------


def module(activation: Activation = "ramp", sets: int = 1) -> KernelActivation:
    torch.manual_seed(0)
    return KernelActivation(Site("a", ("b",), ()), 3, 6, sets, activation)


def test_scores_are_those_of_the_sources_module() -> None:
    """A 1×1 convolution, then global average pooling."""
    made = module().eval()
    head = next(made.iterate_heads())
    head.norm.get_buffer("running_mean").normal_()
    head.norm.get_buffer("running_var").uniform_(0.5, 1.5)
    weight_KC, bias_K, _ = head.fold()
    maps_BKHW = F.conv2d(X, weight_KC[:, :, None, None], bias_K)
    gate_BK11 = made(X)
    torch.testing.assert_close(made.score_BK, maps_BKHW.mean((2, 3)))
    active_BK = torch.sigmoid(made.score_BK) > 0.5
    assert torch.equal(gate_BK11[:, :, 0, 0] > 0, active_BK)
    assert torch.equal(made.active_BK, active_BK.float())


def test_one_image_in_training_is_looked_at_as_in_evaluation() -> None:
    """The last batch of an epoch may have no more, and no spread."""
    torch.manual_seed(0)
    one = gated(convnet(in_channels=3).eval(), X)
    head = next(iterate_modules(one)).heads[0]
    mean_BC = X.mean((2, 3))
    with torch.no_grad():
        expected = head(mean_BC[:1])
        assert torch.equal(head.train()(mean_BC[:1]), expected)
        assert not torch.equal(head(mean_BC)[:1], expected)
    assert one.train()(X[:1]).isfinite().all()


def test_a_map_that_hardly_varies_does_not_decide_alone() -> None:
    """Its variance is next to nothing, so that whoever switches it on is billions of deviations off."""
    made = module().eval()
    head = next(made.iterate_heads())
    torch.nn.init.ones_(head.linear.weight)
    head.norm.get_buffer("running_var").copy_(torch.tensor([1e-20, 1, 1]))
    x_BCHW = torch.zeros(2, 3, 4, 4)
    x_BCHW[0, 0] = 1e3
    made(x_BCHW)
    assert torch.equal(made.score_BK[0] - made.score_BK[1], torch.full((6,), WITHIN))


@pytest.mark.parametrize("activation", get_args(Activation))
def test_they_start_nearly_open(activation: Activation) -> None:
    assert module(activation).eval()(X).mean() == 1
    assert 0.75 < module(activation)(X).mean() <= 1


def test_the_straight_gradient_is_that_of_the_sigmoid() -> None:
    score_BK = torch.tensor([[-1.0, 0.5, 2]], requires_grad=True)
    gate_BK = compute_gates(score_BK, "straight_through", training=True, temperature=1.0)
    assert gate_BK.tolist() == [[0, 1, 1]]
    gate_BK.sum().backward()
    soft = torch.sigmoid(score_BK.detach())
    torch.testing.assert_close(score_BK.grad, soft * (1 - soft))


def test_sparing_drives_no_scores_apart() -> None:
    """What asks for fewer kernels moves the scores of all samples alike: weights are the task's to learn."""
    made = module()
    learnt = next(made.iterate_heads()).linear
    torch.nn.init.normal_(learnt.weight)
    made(X.repeat(4, 1, 1, 1) + torch.randn(12, 3, 16, 16))
    assert torch.equal(made.active_BK.detach(), (made.active_BK > 0.5).float())
    made.active_BK.sum().backward()
    assert learnt.bias.grad is not None and (learnt.bias.grad > 0).all()
    torch.testing.assert_close(learnt.weight.grad, torch.zeros(6, 3), atol=1e-5, rtol=0)


def test_a_soft_gate_becomes_hard_as_it_cools() -> None:
    score_BK = torch.tensor([[-1.0, 0.5, 2]])
    torch.testing.assert_close(compute_gates(score_BK, "soft", True, 1.0), torch.sigmoid(score_BK))
    assert compute_gates(score_BK, "soft", True, 1e-3).tolist() == [[0, 1, 1]]


def test_a_gumbel_gate_is_on_as_often_as_the_sigmoid_says() -> None:
    score_BK = torch.tensor([[-1.0, 0.5, 2, 0]]).expand(20_000, -1)
    often_K = compute_gates(score_BK, "gumbel", True, 1.0).mean(0)
    torch.testing.assert_close(often_K, torch.sigmoid(score_BK[0]), atol=0.02, rtol=0)


def test_a_network_starts_as_it_was_with_its_weakest_kernels_next_to_the_threshold() -> None:
    net = randomised(convnet(in_channels=3)).eval()
    net[3].weight.data[:, 2] = 0  # type: ignore[index, union-attr, operator]
    found = attach_modules(net, discover(net, X), sets=2)
    with torch.no_grad():
        assert torch.equal(found(X), net(X))
    (first, *_) = iterate_modules(found)
    assert first.site == Site("0", (Reader("3", 0, 8, 8),), (), "0")
    for h in first.iterate_heads():
        bias_K = h.linear.bias
        assert bias_K.argmin() == 2 and len(bias_K.unique()) == len(bias_K) and bias_K.min() >= 1


def test_one_of_several_sets_rules() -> None:
    net = gated(convnet(in_channels=3).eval(), X, sets=3)
    with torch.no_grad():
        said = []
        for chosen in (0, 1, 2, 0):
            select_set(net, chosen)
            said.append(net(X))
    assert torch.equal(said[0], said[3]) and not torch.equal(said[0], said[1])
    assert not torch.equal(said[1], said[2])


@pytest.mark.parametrize("chosen", [-1, 2, 7, 1.0, "1", True, None])
def test_a_set_that_does_not_exist_is_refused(chosen: Any) -> None:
    net = gated(convnet(in_channels=3), X, sets=2)
    with pytest.raises(
        OptionError, match=rf"there is no set {chosen!r} of kernel activation modules: .* has 0 … 1"
    ):
        select_set(net, chosen)
    with pytest.raises(OptionError, match="the network has none"):
        select_set(convnet(), 0)


def normalise_instances() -> Net:
    return between(nn.InstanceNorm2d(6, affine=True, track_running_stats=True))


@pytest.mark.parametrize(
    ("build", "momentum"),
    [(partial(resnet20, 4), 0.1), (partial(resnet20, 4), None), (normalise_instances, 0.1)],
)
def test_each_set_has_the_statistics_of_what_it_leaves_on(build: Any, momentum: float | None) -> None:
    """As if it were the only one, and saw only the batches that it ruled."""
    plain = randomised(build())
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = momentum
    both = gated(copy.deepcopy(plain), X, sets=2)
    alone = [attach_modules(copy.deepcopy(plain), discover(plain, X)) for _ in range(2)]
    for k, net in enumerate(alone):
        for one, other in zip(iterate_modules(net), iterate_modules(both), strict=True):
            one.heads[0].load_state_dict(other.heads[k].state_dict())
    with torch.no_grad():
        for step in range(6):
            k, x = step % 2, torch.randn(8, 3, 16, 16)
            select_set(both, k)
            torch.testing.assert_close(both.train()(x), alone[k].train()(x))
        ways = [both.eval(), make_skipping(both), make_masked(both)]
        for k in (0, 1, 0):
            expected = alone[k].eval()(X)
            for way in ways:
                select_set(way, k)
                torch.testing.assert_close(way(X), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone[0](X), alone[1](X), rtol=0.1)


def test_sets_and_activations_that_cannot_be_are_refused() -> None:
    with pytest.raises(OptionError, match="sets=0 cannot be: set it to a whole number, 1 or more"):
        module(sets=0)
    with pytest.raises(
        OptionError, match="kernels cannot be activated by 'hope': set activation to scale, ramp, straight"
    ):
        module("hope")  # type: ignore[arg-type]


# --- what they cost ---------------------------------------------------------------------------------------


def by_compaction(net: fx.GraphModule, plain: nn.Module, b: int) -> int:
    """MACs of the network that has only the kernels that sample b engages."""
    small = copy.deepcopy(plain)
    keep = {m.site.writer: m.active_BK[b].nonzero().flatten() for m in iterate_modules(net)}
    reindex(small, discover(small, X), keep)
    return count_macs(small, X[:1])


def join_three(in_channels: int) -> Net:
    """Maps of two layers lie beside the input where they are read."""
    return joined(lambda m, x: torch.cat([m.expand(x).relu(), x, m.other(x)], 1), 12 + in_channels)


@pytest.mark.parametrize("build", [convnet, resnet20, join_three])
def test_macs_are_those_of_the_compacted_network_and_of_the_modules(build: Any) -> None:
    plain = build(in_channels=3).eval()
    net = gated(plain, X)
    engaged = ActivationCost(net, X)
    assert engaged.dense_macs == count_macs(plain, X)
    heads = sum(h.linear.weight.numel() for m in iterate_modules(net) for h in m.iterate_heads())
    assert engaged.module_macs == heads
    with torch.no_grad():
        net(X)
    expected = [by_compaction(net, plain, b) + heads for b in range(len(X))]
    assert engaged.macs_B().round().int().tolist() == expected
    on = torch.cat([m.active_BK for m in iterate_modules(net)], 1)
    torch.testing.assert_close(engaged.kernels_B(), on.sum(1) / on.shape[1])
    torch.testing.assert_close(
        engaged.fraction("macs"), torch.tensor(expected).float().mean() / engaged.dense_macs
    )


@pytest.mark.parametrize(
    ("loss", "ramp_up", "expected"),
    [
        (ActivationLoss(2.0), 1.0, 0.8),
        (ActivationLoss(2.0), 0.5, 0.4),
        (ActivationLoss(2.0, "square"), 1.0, 0.32),
        (ActivationLoss(10.0, "target", target=0.3), 1.0, 0.1),
        (ActivationLoss(10.0, "target", target=0.2), 0.5, 0.4),
        (ActivationLoss(10.0, "target", target=0.2), 0.0, 3.6),
        (ActivationLoss(0.0), 1.0, 0.0),
    ],
)
def test_the_loss_by_hand(loss: ActivationLoss, ramp_up: float, expected: float) -> None:
    assert float(loss.loss(torch.tensor(0.4), ramp_up)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "cubic"}, "set form to linear, square, target, threshold and by to kernels or macs"),
        ({"by": "time"}, "set form to"),
        ({"gain": -1.0}, "gain=-1.0 cannot be: set it to a number, 0 or more"),
        ({"form": "target"}, "of the form 'target' has a target: set form to target or threshold and a"),
        ({"form": "linear", "target": 0.5}, "of the form 'linear' has no target: set form to target or"),
        ({"form": "target", "target": 1.5}, "target=1.5 cannot be: set it to a number above 0 and below 1"),
    ],
)
def test_an_activation_loss_that_cannot_be_is_refused(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ActivationLoss(**options)


def test_an_activation_loss_with_a_target_is_about_it() -> None:
    assert ActivationLoss(2.0, target=0.3) == ActivationLoss(2.0, "target", target=0.3)
    assert ActivationLoss(2.0) == ActivationLoss(2.0, "linear")


def test_a_multiplier_brings_the_fraction_to_its_target_whatever_the_task_gains_by_it() -> None:
    """The square alone rests where its slope is the task's: at target + slope / (2 · gain)."""
    loss, slope = ActivationLoss(10.0, "target", target=0.3), 4.0

    def rest(steps: int, part: float) -> float:
        fraction, multiplier = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0)
        for _ in range(steps):
            total = loss.loss(fraction, 1.0, multiplier) - slope * fraction
            (gradient,) = torch.autograd.grad(total, fraction)
            fraction = (fraction - 0.02 * gradient).detach().requires_grad_()
            multiplier = loss.update_multiplier(multiplier, fraction.detach(), 1.0, part)
        return float(fraction.detach())

    assert rest(300, part=0.0) == pytest.approx(0.3 + slope / 20, abs=1e-3)
    assert rest(300, part=1 / 20) == pytest.approx(0.3, abs=1e-3)
    halfway = [loss.update_multiplier(torch.tensor(2.0), torch.tensor(f), 0.5, 0.1) for f in (0.65, 0.75)]
    assert [float(value) for value in halfway] == pytest.approx([2.0, 2.2])  # the target is still 0.65
    linear = ActivationLoss(1.0)
    assert float(linear.update_multiplier(torch.tensor(0.0), torch.tensor(0.9), 1.0, 1.0)) == 0


@pytest.mark.parametrize("by", ["kernels", "macs"])
def test_gradients_close_kernels(by: Any) -> None:
    torch.manual_seed(0)
    net = attach_modules(plain := convnet(in_channels=3), discover(plain, X)).train()
    engaged, optimizer = ActivationCost(net, X), torch.optim.SGD(net.parameters(), lr=20.0)
    shares = []
    for _ in range(60):
        net(X)
        loss = ActivationLoss(1.0, by=by).loss(engaged.fraction(by))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(float(engaged.fraction(by).detach()))
    assert shares[0] > 0.95 and shares[-1] < 0.5
    assert all((m.active_BK.sum(1) > 0.99).all() for m in iterate_modules(net)), "never to no kernel at all"


@torch.no_grad()
def test_parts_that_are_compiled_in_place_are_looked_into() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 6), nn.Sequential(nn.ReLU(), conv(6, 8), nn.ReLU()), head(8)).eval()
    expected = net(X)
    net[0].compile(backend="eager")
    net[1].compile(backend="eager")
    dynamic = attach_modules(net, discover(net, X)).eval()
    for module in iterate_modules(dynamic):
        nn.init.constant_(module.heads[0].linear.bias, 10.0)  # type: ignore[operator, union-attr, arg-type]
    for network in (dynamic, make_skipping(dynamic, [X]), make_skipping(net, [X])):
        torch.testing.assert_close(network(X), expected)
    assert net[0]._compiled_call_impl is not None and net[1]._compiled_call_impl is not None
