"""Networks that skip: the same as masked ones, by whatever way, chosen by measuring."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from elastic.kam import Choice, choose, modules
from elastic.models import convnet, resnet20
from elastic.skipping import WAYS, masked, rewrite, skipping, tune
from tests.elastic.gated import case_or_none, gated
from tests.elastic.zoo import CASES, randomised

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def executed(net: fx.GraphModule, way: str) -> fx.GraphModule:
    return masked(net) if way == "masked" else skipping(net, way=way)


@pytest.mark.parametrize("way", [*WAYS, "masked"])
@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 3), choice=st.sampled_from(["scale", "ramp", "soft"]))
@settings(max_examples=4)
def test_skipping_says_what_masking_says(name: str, way: str, seed: int, batch: int, choice: Choice) -> None:
    case = CASES[name]
    net = case_or_none(case, seed, choice)
    if net is None:
        return
    x = case.example(seed)[:1].repeat(batch, *[1] * (len(case.shape) - 1))
    random, fast = torch.Generator().manual_seed(seed), executed(net, way)
    with torch.no_grad():
        for _ in range(2):  # the second time calls are replayed
            x = x + torch.randn(x.shape, generator=random)
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)


TORCHVISION = ["resnet18", "mobilenet_v2", "vgg11_bn", "densenet121", "shufflenet_v2_x0_5", "squeezenet1_1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize("way", [*WAYS, "masked"])
def test_so_it_does_in_torchvisions_networks(name: str, way: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    net = gated(randomised(torchvision.models.get_model(name)).eval(), x)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(
            executed(net, way)(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )
    assert 0.1 < torch.cat([m.on_BK.flatten() for m in modules(net)]).mean() < 0.9


@pytest.mark.parametrize("way", ["kernel", "masked"])
def test_a_set_is_chosen_between_requests_of_the_skipping_network_too(way: str) -> None:
    net = gated(convnet(in_channels=3).eval(), X, sets=2)
    active = executed(net, way)
    with torch.no_grad():
        for chosen in (1, 0, 1):
            choose(net, chosen)
            choose(active, chosen)
            torch.testing.assert_close(active(X), net(X), rtol=1e-4, atol=1e-5)


def test_tuning_gives_every_layer_its_fastest_way(monkeypatch: pytest.MonkeyPatch) -> None:
    net = rewrite(gated(convnet(in_channels=3).eval(), X))
    layers = [m for m in net.modules() if type(m).__name__ == "ActiveConv2d"]
    fastest = dict(zip(layers, ["dense", "stock", "dense", "stock"], strict=True))
    clock = {"now": 0.0}
    for layer in layers:
        forward = layer.forward

        def slow(*args: Any, layer: Any = layer, forward: Any = forward) -> Tensor:
            clock["now"] += 1.0 if layer.way == fastest[layer] else 2.0
            return forward(*args)

        monkeypatch.setattr(layer, "forward", slow)
    monkeypatch.setattr("elastic.skipping.network.time.perf_counter", lambda: clock["now"])
    tune(net, [X[:1]])
    assert {layer: layer.way for layer in layers} == fastest


def test_a_network_without_modules_is_executed_in_full() -> None:
    net = randomised(resnet20()).eval()
    with torch.no_grad():
        torch.testing.assert_close(skipping(net, [X])(X), net(X), rtol=1e-4, atol=1e-4)


def test_the_network_itself_is_left_as_it_is() -> None:
    net = gated(resnet20().eval(), X)
    before = copy.deepcopy(net.state_dict())
    names = list(before)
    skipping(net, [X[:1]])
    assert list(net.state_dict()) == names
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
