"""Where a forward sets the precision itself, against the real network."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic import attach_modules, discover
from elastic.dynamic.modules import iterate_modules
from elastic.widths.tracing import make_meta_copy, trace_both_modes
from tests.elastic.zoo import Net

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Forward = Callable[[Any, Tensor], Tensor]


def leave_region(m: Any, x: Tensor) -> Tensor:
    """Compute what half precision cannot hold."""
    y = m.stem(x).relu()
    with torch.autocast("cpu", enabled=False):
        energy = (1e4 * m.mid(y.float())).square()
        y = energy / energy.mean((2, 3), keepdim=True)
    return m.last(y)  # type: ignore[no-any-return]


def ask_for_device(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x).relu()
    with torch.autocast(device_type=x.device.type, enabled=False):
        y = m.mid(1e3 * y.float())
    return m.last(y)  # type: ignore[no-any-return]


@torch.autocast("cpu", enabled=False)
def scale(m: Any, y: Tensor) -> Tensor:
    return m.mid(1e3 * y.float())  # type: ignore[no-any-return]


def leave_by_decorator(m: Any, x: Tensor) -> Tensor:
    return m.last(scale(m, m.stem(x).relu()))  # type: ignore[no-any-return]


def enter_region(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.mid(m.stem(x).relu())
    return m.last(y.float())  # type: ignore[no-any-return]


def enter_by_default(m: Any, x: Tensor) -> Tensor:
    """Take the type that is set around it."""
    with torch.autocast("cpu"):
        y = m.mid(m.stem(x).relu())
    return m.last(y.float())  # type: ignore[no-any-return]


def nest_regions(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.stem(x).relu()
        with torch.autocast("cpu", enabled=False):
            z = m.mid(y.float())
        y = m.mid(y) + z
    return m.last(y.float())  # type: ignore[no-any-return]


def leave_for_another_device(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        y = m.mid(m.stem(x).relu())
    return m.last(y)  # type: ignore[no-any-return]


FORWARDS: tuple[Forward, ...] = (
    *(leave_region, ask_for_device, leave_by_decorator, leave_for_another_device),
    *(enter_region, enter_by_default, nest_regions),
)
MODES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_net(forward: Forward) -> nn.Module:
    torch.manual_seed(0)
    return Net(forward, stem=nn.Conv2d(3, 8, 1), mid=nn.Conv2d(8, 8, 1), last=nn.Conv2d(8, 5, 1))


def compute(net: nn.Module, dtype: torch.dtype | None, like: nn.Module) -> list[Tensor | None]:
    """Compute the output under autocast, and the gradients of the parameters."""
    net.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = net(X)
    output.float().square().mean().backward()
    return [output.detach(), *(net.get_parameter(name).grad for name, _ in like.named_parameters())]


@pytest.mark.parametrize("forward", FORWARDS)
def test_shapes_are_computed_without_data(forward: Forward) -> None:
    net = make_net(forward)
    traced = trace_both_modes(net, X.to("meta"))
    assert make_meta_copy(traced)(X.to("meta")).shape == net(X).shape


@pytest.mark.parametrize("dtype", MODES.values(), ids=MODES)
@pytest.mark.parametrize("forward", FORWARDS)
def test_a_traced_network_has_the_precision_of_its_forward(
    forward: Forward, dtype: torch.dtype | None
) -> None:
    net = make_net(forward)
    expected = [*compute(net, dtype, net)]
    traced = trace_both_modes(net, X.to("meta"))
    for actual, value in zip(compute(traced.train(), dtype, net), expected, strict=True):
        assert actual is not None and value is not None
        assert actual.dtype == value.dtype
        torch.testing.assert_close(actual, value, rtol=0, atol=0, equal_nan=True)


def test_half_precision_does_not_hold_what_a_region_computes() -> None:
    """So a network with modules, all of whose kernels are on, is finite only if it keeps the region."""
    net = make_net(leave_region)
    dynamic = attach_modules(net, discover(net, X)).eval()
    for module in iterate_modules(dynamic):
        nn.init.constant_(module.heads[0].linear.bias, 10.0)  # type: ignore[operator, union-attr, arg-type]
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert dynamic(X).isfinite().all()


def fail(*_: Any) -> None:
    raise RuntimeError


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_step_that_fails_within_a_region_leaves_nothing_behind(forward: Forward) -> None:
    """Neither a precision, nor weights that have been cast and are not cast again once they change."""
    net = make_net(forward)
    traced = trace_both_modes(net, X.to("meta")).train()
    hook = net.mid.register_forward_hook(fail)  # type: ignore[operator, union-attr]
    with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16):
        traced(X)
    hook.remove()
    assert not torch.is_autocast_enabled("cpu")
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(traced(X), net(X), rtol=0, atol=0)
        with torch.no_grad():
            net.mid.weight.mul_(2.0)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("forward", [enter_region, nest_regions])
def test_weights_that_change_between_calls_are_cast_again(forward: Forward) -> None:
    net = make_net(forward)
    traced = trace_both_modes(net, X.to("meta")).train()
    for _ in range(2):
        expected = net(X)  # which forgets what has been cast before and behind it
        torch.testing.assert_close(traced(X), expected, rtol=0, atol=0)
        with torch.no_grad():
            net.mid.weight.mul_(2.0)  # type: ignore[operator, union-attr]
    assert not torch.is_autocast_enabled("cpu")


def test_tracing_leaves_torch_as_it_was() -> None:
    before = [dict(vars(kind)) for kind in (torch.autocast, nn.Module)]
    trace_both_modes(make_net(nest_regions), X.to("meta"))
    assert [dict(vars(kind)) for kind in (torch.autocast, nn.Module)] == before
