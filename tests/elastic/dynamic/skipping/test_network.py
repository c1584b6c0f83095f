"""Networks that skip: the same as masked ones, by whatever method, chosen by measuring."""

import copy
import operator
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

from elastic.dynamic.activations import Activation
from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.modules import iterate_modules, select_set
from elastic.dynamic.skipping import list_methods, make_masked, make_skipping, rewrite, tune
from elastic.dynamic.skipping.active import Active, list_all_channels
from elastic.dynamic.skipping.compiling import load_kernel
from elastic.dynamic.skipping.convolution import ActiveConv2d, Method
from elastic.errors import OptionError, StructureError
from elastic.models import convnet, resnet20
from elastic.widths.discovery import discover
from tests.elastic.dynamic.gated import case_or_none, gated
from tests.elastic.zoo import CASES, Net, conv, head, randomised

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
DEFAULT = list_methods()[0]


def executed(net: fx.GraphModule, method: str) -> fx.GraphModule:
    return make_masked(net) if method == "masked" else make_skipping(net, method=cast(Method, method))


def check_skipping(name: str, method: str, seed: int, batch: int, activation: Activation) -> None:
    """What is executed says what the masked network says, for two batches of images."""
    case = CASES[name]
    net = case_or_none(case, seed, activation)
    if net is None:
        return
    x = case.example(seed)[:1].repeat(batch, *[1] * (len(case.shape) - 1))
    random, fast = torch.Generator().manual_seed(seed), executed(net, method)
    with torch.no_grad():
        for _ in range(2):  # the second time calls are replayed
            x = x + torch.randn(x.shape, generator=random)
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)


ACTIVATIONS: tuple[Activation, ...] = ("scale", "ramp", "soft")
SOME = ("plain", "residual", "depthwise_multiplied", "chunk", "joined_with_the_input", "dense")
drawn = given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from(ACTIVATIONS))


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", CASES)
@drawn
@settings(max_examples=2)
def test_skipping_says_what_masking_says(name: str, seed: int, batch: int, activation: Activation) -> None:
    check_skipping(name, DEFAULT, seed, batch, activation)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("method", [*list_methods(), "masked"])
@pytest.mark.parametrize("name", SOME)
@drawn
@settings(max_examples=2)
def test_so_it_does_by_every_method(
    name: str, method: str, seed: int, batch: int, activation: Activation
) -> None:
    check_skipping(name, method, seed, batch, activation)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*list_methods(), "masked"])
@pytest.mark.parametrize("name", CASES)
@drawn
@settings(max_examples=6)
def test_so_it_does_in_every_network_by_every_method(
    name: str, method: str, seed: int, batch: int, activation: Activation
) -> None:
    check_skipping(name, method, seed, batch, activation)


def test_what_is_no_number_comes_through() -> None:
    """Also where kernels are off for it: none is, as torch has it."""
    x = X.clone()
    x[1, :, 4, 4] = torch.nan
    for activation in ACTIVATIONS:
        net = gated(randomised(convnet(in_channels=3)).eval(), X, activation=activation)
        with torch.no_grad():
            found, expected = make_skipping(net, method=DEFAULT)(x), net(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert expected.isnan().any(1).tolist() == [False, True, False]


TORCHVISION = ["resnet18", "mobilenet_v2", "vgg11_bn", "densenet121", "shufflenet_v2_x0_5", "squeezenet1_1"]
TORCHVISION += ["mobilenet_v3_small", "efficientnet_b0"]  # squeeze and excite


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize("method", [*list_methods(), "masked"])
def test_so_it_does_in_torchvisions_networks(name: str, method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    net = gated(randomised(torchvision.models.get_model(name)).eval(), x)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(
            executed(net, method)(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )
    assert 0.1 < torch.cat([m.active_BK.flatten() for m in iterate_modules(net)]).mean() < 0.9


def three(forward: Callable[[Any, Tensor], Tensor], **more: Any) -> nn.Module:
    """Three convolutions, a head and whatever else a forward joins."""
    return Net(forward, a=conv(3, 8, 3), b=conv(8, 6, 3), c=conv(6, 6, 3), h=head(6, 5), **more)


def spreading(n: Any, x: Tensor) -> Tensor:
    y = n.a(x).relu()
    return n.h((n.b(y) + n.t(y.mean((2, 3), keepdim=True))).relu())  # type: ignore[no-any-return]


def before_it_changes(n: Any, x: Tensor) -> Tensor:
    """A shortcut's convolution reads what is changed in place before its maps are added."""
    y = n.a(x)
    shortcut = n.t(y)
    return n.h(n.c(n.b(n.change(y)).relu()) + shortcut)  # type: ignore[no-any-return]


def changed_and_not_returned(n: Any, x: Tensor) -> Tensor:
    y = n.a(x)
    n.change(y)
    return n.h(n.b(y))  # type: ignore[no-any-return]


class Handed(torch.autograd.Function):
    """Call layers that it is handed, as blocks of RevNet do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: nn.Module) -> Tensor:
        return layers(x)  # type: ignore[no-any-return]


def norm_and_relu() -> dict[str, nn.Module]:
    return {"norm": nn.BatchNorm2d(6), "relu": nn.ReLU()}


def hooked(net: nn.Module) -> nn.Module:
    """Layers that are joined elsewhere: what each gives is turned over by a hook."""
    for name in ("b", "norm", "h.0"):
        net.get_submodule(name).register_forward_hook(lambda m, a, y: y.flip(1))
    return net


AWKWARD: dict[str, Callable[[], nn.Module]] = {
    "a parameter is added": lambda: three(
        lambda n, x: n.h(n.c((n.b(n.a(x).relu()) + n.shift).relu())),
        shift=nn.Parameter(torch.randn(1, 6, 1, 1)),
    ),
    "one pixel is added to all": lambda: three(spreading, t=conv(8, 6)),
    "all are added to one pixel": lambda: three(
        lambda n, x: n.h(n.t(n.b(n.a(x).relu()).mean((2, 3), keepdim=True)) + n.s(x)),
        t=conv(6, 6),
        s=conv(3, 6),
    ),
    "pixels become channels": lambda: three(
        lambda n, x: n.h(n.t(F.max_pool2d(n.a(x).relu(), 8).view(x.size(0), -1, 1, 1))), t=conv(32, 6)
    ),
    "a pool has a border on one side": lambda: three(
        lambda n, x: n.h(n.b(n.pool(n.a(x).relu()))), pool=nn.MaxPool2d(3, 2, padding=(0, 1))
    ),
    "a pool is spread on one side": lambda: three(
        lambda n, x: n.h(n.b(n.pool(n.a(x).relu()))), pool=nn.MaxPool2d(2, 2, dilation=(1, 2))
    ),
    "a layer works in place": lambda: three(before_it_changes, t=conv(8, 6), change=nn.ReLU(inplace=True)),
    "a function works in place": lambda: three(
        before_it_changes, t=conv(8, 6), change=lambda y: F.relu(y, True)
    ),
    "a method works in place": lambda: three(before_it_changes, t=conv(8, 6), change=lambda y: y.relu_()),
    "a sum works in place": lambda: three(
        before_it_changes, t=conv(8, 6), change=lambda y: operator.iadd(y, 0.5)
    ),
    "what is changed is named": lambda: three(
        before_it_changes, t=conv(8, 6), change=lambda y: torch.clamp(y, min=0.2, out=y)
    ),
    "a truth is added": lambda: three(lambda n, x: n.h(n.b(n.a(x).relu()) + (n.t(x) > 0)), t=conv(3, 6)),
    "a number is added": lambda: three(lambda n, x: n.h(n.b(n.a(x).relu()) + x.shape[1] * 2)),
    "things are named": lambda: three(
        lambda n, x: n.h(torch.mul(n.b(n.a(x).relu()), other=n.t(input=x))), t=conv(3, 6)
    ),
    "layers without effect are told by name": lambda: three(
        lambda n, x: n.h(n.drop(input=n.b(n.same(input=n.a(x).relu())))),
        same=nn.Identity(),
        drop=nn.Dropout(),
    ),
    "maps are averaged by name": lambda: three(lambda n, x: n.h[2](n.h[1](n.h[0](input=n.b(n.a(x).relu()))))),
    "maps are flattened by name": lambda: three(
        lambda n, x: n.h[2](input=n.h[1](input=n.h[0](input=n.b(n.a(x).relu()))))
    ),
    "nobody reads what works in place": lambda: three(changed_and_not_returned, change=nn.ReLU(inplace=True)),
    "layers have hooks": lambda: hooked(
        three(lambda n, x: n.h(n.relu(n.norm(n.b(n.relu(n.c2(n.a(x))))))), c2=conv(8, 8), **norm_and_relu())
    ),
    "a function is handed layers": lambda: three(
        lambda n, x: n.h(Handed.apply(n.b(n.a(x).relu()), n.apart)),
        apart=nn.Sequential(conv(6, 6), nn.ReLU(), nn.Sequential(conv(6, 6))),
    ),
    "a norm has no statistics": lambda: three(
        lambda n, x: n.h(n.b(n.norm(n.a(x)).relu())), norm=nn.BatchNorm2d(8, track_running_stats=False)
    ),
}


@pytest.mark.sampled(20)
@pytest.mark.parametrize("method", [*list_methods(), "masked"])
@pytest.mark.parametrize("name", AWKWARD)
def test_so_it_does_where_layers_cannot_be_joined(name: str, method: str) -> None:
    torch.manual_seed(0)
    net = gated(randomised(AWKWARD[name]()).eval(), X)
    with torch.no_grad():
        fast = executed(net, method)
        for x in (X, X.flip(0), X[:1]):  # the second time calls are replayed
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_that_are_parametrized_are_computed_once() -> None:
    layers = [
        conv(3, 8, 3),
        nn.ReLU(),
        conv(8, 6, 3),
        nn.ReLU(),
        weight_norm(conv(6, 4, 3)),
        nn.BatchNorm2d(4),
    ]
    net = randomised(nn.Sequential(*layers, nn.ReLU(), head(4)))
    dynamic = attach_modules(net, discover(net, X)).eval()
    expected = dynamic(X)
    torch.testing.assert_close(make_skipping(dynamic)(X), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dynamic(X), expected)  # whose layers stay parametrized
    assert is_parametrized(layers[4])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: net.double(), r"in fp32 on the CPU, not in torch\.float64 on cpu: convert the network"),
        (lambda net: net.to("meta"), "in fp32 on the CPU, not in torch.float32 on meta"),
        (
            nn.Sequential,
            "Sequential only contains a network with kernel activation modules: give that itself",
        ),
    ],
)
def test_networks_that_cannot_skip_are_refused(make: Callable[[nn.Module], nn.Module], message: str) -> None:
    net = make(gated(resnet20().eval(), X))
    with pytest.raises(StructureError, match=message):
        make_skipping(net)


class Bounded(nn.Conv2d):
    """Bound the weights in each forward, as networks for brain signals do."""

    def __init__(self, bound: Callable[[nn.Conv2d], Any]) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.bound = bound

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.bound(self)
        return super().forward(x_BCHW)


def renew(layer: nn.Conv2d) -> None:
    layer.weight.data = layer.weight.data.clamp(-0.01, 0.01)


def divide(layer: nn.Conv2d) -> None:
    weight = layer.weight.data
    weight /= weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("make", [make_skipping, lambda net, samples: make_masked(net)])
@pytest.mark.parametrize("samples", [(), (X,)], ids=["alone", "sample"])
@pytest.mark.parametrize("bound", [renew, divide, lambda layer: layer.weight.data.mul_(0.5)])
def test_a_forward_that_changes_its_weights_is_refused(
    make: Callable[..., nn.Module], samples: tuple[Tensor, ...], bound: Callable[[nn.Conv2d], Any]
) -> None:
    """Layers have copies of them, which would stay as they are."""
    net = nn.Sequential(conv(3, 8, 3), nn.ReLU(), Bounded(bound), nn.ReLU(), head(8)).eval()
    with pytest.raises(StructureError, match=r"changes 2.weight, a parameter|weight.data may be"):
        make(net, samples)


@pytest.mark.parametrize("method", ["kernel", "fastest"])
def test_a_method_that_cannot_be_is_refused(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic.dynamic.skipping.compiling.load_kernel", lambda: None)
    with pytest.raises(OptionError, match=f"'{method}' cannot be .* choose stock, dense"):
        make_skipping(gated(resnet20().eval(), X), method=method)


@pytest.mark.parametrize("method", list_methods())
def test_modules_that_decide_at_random_decide_anew_each_time(method: str) -> None:
    net = gated(randomised(resnet20()).eval(), X, kind="random")
    fast = make_skipping(net, method=cast(Method, method))

    def drawn(one: nn.Module, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return one(X)  # type: ignore[no-any-return]

    with torch.no_grad():
        fast(X)
        assert not torch.equal(drawn(net, 1), drawn(net, 2))
        for seed in (1, 2):
            torch.testing.assert_close(drawn(fast, seed), drawn(net, seed), rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(6)
@pytest.mark.skipif(load_kernel() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[:1, :1], "3 channels"),
        (X[:1].repeat(1, 2, 1, 1), "3 channels"),
        (X[0], "3 channels"),
        (X[:1].double(), "fp32 inputs"),
        (X[:1].int(), "fp32 inputs"),
        (X[:1, :, :3, :3], "maps of 1×1 are too small for a kernel"),
        (X[:1, :, :2], "maps of 2×16 are too small for a kernel"),
        (X[:1, :, :5, :5], "maps of 1×1 are too small for a pool"),
    ],
)
def test_inputs_that_are_no_images_are_refused(x: Tensor, message: str, seen: bool) -> None:
    """Also when what images call for has been recorded."""
    layers = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 6, 3), "pool": nn.MaxPool2d(2), "h": head(6)}
    net = Net(lambda n, x: n.h(n.pool(n.b(n.a(x).relu())).relu()), **layers)
    fast = make_skipping(gated(randomised(net).eval(), X), method="kernel")
    with torch.no_grad():
        if seen:
            fast(X[:1])
        with pytest.raises(StructureError, match=message):
            fast(x)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", list_methods())
def test_it_computes_in_fp32_whatever_a_program_has_set(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reads addresses: tensors of another type or place would be anything to it."""
    net = gated(randomised(resnet20()).eval(), X, activation="scale")
    blocks = randomised(resnet20()).eval()
    for layer in blocks.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels > 3:
            layer.weight.data[: layer.out_channels // 2, layer.in_channels // 2 :] = 0
    list_all_channels.cache_clear()
    with torch.no_grad():
        for each in (net, blocks):
            expected = each(X)
            with torch.autocast("cpu", torch.bfloat16):
                fast = make_skipping(each, method=method)
                torch.testing.assert_close(fast(X), expected, rtol=1e-4, atol=1e-5)
            for set_default, other in (
                (torch.set_default_dtype, torch.float64),
                (torch.set_default_device, "meta"),
            ):
                list_all_channels.cache_clear()
                set_default(other)
                try:
                    found = make_skipping(each, method=method)(X)
                finally:
                    torch.set_default_dtype(torch.float32)
                    torch.set_default_device(None)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", sorted({DEFAULT, "stock"}))
def test_torch_compiles_nothing_of_it_and_exports_nothing(method: Method) -> None:
    net = gated(randomised(convnet(in_channels=3)).eval(), X)
    fast = make_skipping(net, method=method)
    compiled = torch.compile(fast, backend="eager")
    with torch.no_grad():
        for x in (X, X[:1]):
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        StructureError, match="that skips cannot be exported: export the one that it is made of"
    ):
        torch.export.export(fast, (X,))


def test_weights_are_loaded_before_it_is_made() -> None:
    """Else the copies that it has would stay, in silence."""
    net = gated(randomised(convnet(in_channels=3)).eval(), X)
    fast, other = make_skipping(net), make_skipping(net)
    with pytest.raises(
        StructureError, match="copies of weights: load weights into the network that it is made of"
    ):
        other.load_state_dict(fast.state_dict())


def test_samples_are_a_tensor_or_whatever_gives_some() -> None:
    net = gated(randomised(convnet(in_channels=3)).eval(), X)
    for samples in (X, (x for x in (X, X[:1]))):
        with torch.no_grad():
            torch.testing.assert_close(make_skipping(net, samples)(X), net(X), rtol=1e-4, atol=1e-5)


def test_a_forward_that_asks_for_sizes_is_traced_by_a_sample() -> None:
    net = three(lambda n, x: n.h(n.b(n.a(x).relu() if x.shape[2] > 8 else n.a(x)))).eval()
    with pytest.raises(
        StructureError, match="or give a sample, by which a forward that asks for sizes is traced"
    ):
        make_skipping(net)
    with torch.no_grad():
        torch.testing.assert_close(make_skipping(net, [X])(X), net(X), rtol=1e-4, atol=1e-5)


def test_a_network_that_is_refused_keeps_its_set() -> None:
    net = gated(resnet20().eval(), X, sets=2).double()
    select_set(net, 1)
    with pytest.raises(StructureError, match="fp32"):
        make_skipping(net)
    assert {module.active_set for module in iterate_modules(net)} == {1}


def test_a_network_in_training_can_be_looked_at() -> None:
    """What it engaged last has a history, which cannot be copied."""
    net = convnet(in_channels=3)
    switched = attach_modules(net, discover(net, X))
    switched(X).sum().backward()
    fast = make_skipping(switched)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), switched.eval()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [DEFAULT, "masked"])
def test_a_set_is_chosen_between_requests_of_the_skipping_network_too(method: str) -> None:
    net = gated(convnet(in_channels=3).eval(), X, sets=2)
    active = executed(net, method)
    with torch.no_grad():
        for chosen in (1, 0, 1):
            select_set(net, chosen)
            select_set(active, chosen)
            torch.testing.assert_close(active(X), net(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_tuning_gives_every_layer_its_fastest_method(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr("elastic.dynamic.skipping.compiling.load_kernel", lambda: None)
    net = rewrite(gated(convnet(in_channels=3).eval(), X))
    layers = [m for m in net.modules() if isinstance(m, ActiveConv2d)]
    fastest = dict(zip(layers, ["dense", "stock", "dense", "stock"], strict=True))
    clock = {"now": 0.0}
    for layer in layers:
        forward = layer.forward

        def slow(*args: Any, layer: Any = layer, forward: Any = forward) -> Tensor:
            clock["now"] += 1.0 if layer.method == fastest[layer] else 2.0
            return forward(*args)

        monkeypatch.setattr(layer, "forward", slow)
    monkeypatch.setattr("elastic.dynamic.skipping.network.time.perf_counter", lambda: clock["now"])
    tune(net, [X[:1]])
    assert {layer: layer.method for layer in layers} == fastest


def test_a_reader_of_maps_among_others_is_told_which_of_them_are_active() -> None:
    layers = {"one": conv(3, 6), "two": conv(9, 4), "head": head(4)}
    net = Net(lambda m, x: m.head(m.two(torch.cat([x, m.one(x)], 1))), **layers)
    net = gated(randomised(net).eval(), X, names=["one"])
    active = rewrite(net)
    (reader,) = (m for m in active.modules() if isinstance(m, ActiveConv2d) and m.weight.shape[1] == 9)
    told: list[Active] = []
    reader.register_forward_pre_hook(lambda _, args: told.append(args[1]))
    with torch.no_grad():
        active(X)
    net(X)
    on_BK = next(iterate_modules(net)).active_BK
    for b, (channel_K, count) in enumerate(zip(told[0].channel_BK, told[0].count_B, strict=True)):
        assert channel_K[:count].tolist() == [0, 1, 2, *(3 + on_BK[b].nonzero().flatten()).tolist()]


def test_a_network_without_modules_is_executed_in_full() -> None:
    net = randomised(resnet20()).eval()
    with torch.no_grad():
        torch.testing.assert_close(make_skipping(net, [X])(X), net(X), rtol=1e-4, atol=1e-4)


def test_the_network_itself_is_left_as_it_is() -> None:
    net = gated(resnet20().eval(), X)
    before = copy.deepcopy(net.state_dict())
    names = list(before)
    make_skipping(net, [X[:1]])
    assert list(net.state_dict()) == names
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
