"""Where a forward keeps gradients away, against autograd on the real network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic import attach_modules, discover
from elastic.dynamic.modules import iterate_modules
from elastic.pruning.gates import attach_gates, iterate_gates
from elastic.surgery.freezing import find_frozen_widths, is_frozen
from elastic.widths.tracing import trace_both_modes
from tests.elastic.zoo import Net

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class PassThrough(torch.autograd.Function):
    """Have a gradient where the forward has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.detach() * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def freeze_stem(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.stem(x).relu()
    return m.last(m.mid(y).relu())  # type: ignore[no-any-return]


def detach_stem(m: nn.Module, x: Tensor) -> Tensor:
    return m.last(m.mid(m.stem(x).relu().detach()).relu())  # type: ignore[no-any-return]


def read_data(m: nn.Module, x: Tensor) -> Tensor:
    return m.last(m.mid(m.stem(x).relu().data).relu())  # type: ignore[no-any-return]


def gate_without(m: nn.Module, x: Tensor) -> Tensor:
    """Weigh maps by what learns nothing."""
    y = m.stem(x).relu()
    with torch.no_grad():
        gate = m.mid(y.mean((2, 3), keepdim=True)).sigmoid()
    return m.last(y * gate)  # type: ignore[no-any-return]


def freeze_a_half(m: nn.Module, x: Tensor) -> Tensor:
    """Take one of several tensors without a gradient."""
    with torch.no_grad():
        first, second = m.stem(x).chunk(2, 1)
    return m.last(m.mid(torch.cat([first, second], 1)).relu())  # type: ignore[no-any-return]


@torch.no_grad()
def look(m: nn.Module, x: Tensor) -> Tensor:
    return m.stem(x).relu()  # type: ignore[no-any-return]


def freeze_by_decorator(m: nn.Module, x: Tensor) -> Tensor:
    return m.last(m.mid(look(m, x)).relu())  # type: ignore[no-any-return]


def train_within(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.stem(x).relu()
        with torch.enable_grad():
            y = m.mid(y).relu()
    return m.last(y)  # type: ignore[no-any-return]


def freeze_shapes(m: nn.Module, x: Tensor) -> Tensor:
    """Ask a layer's maps for their shape alone."""
    with torch.no_grad():
        y = m.stem(x)
        places = y.shape[2] * y.shape[3]
    return m.last(m.mid(y.flatten(2).sum(2)[..., None, None] / places).relu())  # type: ignore[no-any-return]


def count_without(m: nn.Module, x: Tensor) -> Tensor:
    """Compute with a number of places that was found without gradients."""
    with torch.no_grad():
        height = x.shape[2]
    y = m.mid(m.stem(x).relu())
    return m.last((y.flatten(2) / height).unflatten(2, (height, -1)))  # type: ignore[no-any-return]


def write_into(m: nn.Module, x: Tensor) -> Tensor:
    """Bring a gradient into a tensor that had none, in place."""
    y = m.stem(x).detach()
    z = y.clone()
    z.add_(m.mid(y))
    return m.last(z)  # type: ignore[no-any-return]


def write_a_part(m: nn.Module, x: Tensor) -> Tensor:
    y = m.stem(x).detach()
    z = torch.zeros_like(y)
    z[:, :, 1:] = m.mid(y)[:, :, 1:]
    return m.last(z)  # type: ignore[no-any-return]


@dataclass
class Output:
    y: list[Tensor]


def give_a_class_of_ones_own(m: nn.Module, x: Tensor) -> Any:
    return Output([m.last(m.mid(m.stem(x).detach()).relu())])


def pass_through(m: nn.Module, x: Tensor) -> Tensor:
    return m.last(m.mid(PassThrough.apply(m.stem(x))).relu())  # type: ignore[no-any-return]


def pass_nothing(m: nn.Module, x: Tensor) -> Tensor:
    """Apply a function with a gradient of its own where none is computed."""
    with torch.no_grad():
        y = PassThrough.apply(m.stem(x))
    return m.last(m.mid(y).relu())  # type: ignore[no-any-return]


def call_the_forward(m: nn.Module, x: Tensor) -> Tensor:
    """Leave out a function's own gradient, once it has been applied."""
    y = m.mid(PassThrough.apply(m.stem(x)))
    return m.last(y * PassThrough.forward(None, y))  # type: ignore[no-any-return]


def compute_again(m: nn.Module, x: Tensor) -> Tensor:
    return m.last(m.mid(checkpoint(m.stem, x, use_reentrant=False)).relu())  # type: ignore[no-any-return]


FORWARDS: tuple[Callable[[nn.Module, Tensor], Tensor], ...] = (
    *(freeze_stem, detach_stem, read_data, gate_without, freeze_a_half, freeze_by_decorator),
    *(train_within, freeze_shapes, count_without, write_into, write_a_part, pass_through, compute_again),
    *(give_a_class_of_ones_own, pass_nothing, call_the_forward),
)
FREEZES_STEM = FORWARDS[:3]


def make_net(forward: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Net(forward, stem=nn.Conv2d(3, 8, 1), mid=nn.Conv2d(8, 8, 1), last=nn.Conv2d(8, 5, 1))


def list_gradients(net: nn.Module, like: nn.Module) -> dict[str, Tensor | None]:
    net.zero_grad()
    output = net(X)
    y = output.y[0] if isinstance(output, Output) else output
    y.square().mean().backward()
    return {name: net.get_parameter(name).grad for name, _ in like.named_parameters()}


@pytest.mark.parametrize("forward", FORWARDS)
def test_what_no_gradient_comes_to_is_told(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    net = make_net(forward)
    untrained = {name.partition(".")[0] for name, grad in list_gradients(net, net).items() if grad is None}
    assert discover(net, X).untrained == untrained


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_traced_network_has_the_gradients_of_its_forward(
    forward: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    net = make_net(forward)
    expected = list_gradients(net, net)
    traced = trace_both_modes(net, X.to("meta"))
    for name, gradient in list_gradients(traced.train(), net).items():
        if expected[name] is None:
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, expected[name])


def test_tracing_within_a_mode_without_gradients_freezes_nothing() -> None:
    net = make_net(lambda m, x: m.last(m.mid(m.stem(x)).relu()))
    with torch.no_grad():
        assert not discover(net, X).untrained


@pytest.mark.parametrize("forward", FREEZES_STEM)
def test_what_is_untrained_is_neither_grown_nor_pruned(
    forward: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    """A gate there would have no gradient but its penalty's, and a module none but that of its cost."""
    net = make_net(forward)
    widths = discover(net, X)
    assert find_frozen_widths(net, widths).keys() == {"stem"}
    assert is_frozen(net, widths, "stem") and not is_frozen(net, widths, "mid")
    dynamic = attach_modules(net, widths)
    assert len(list(iterate_modules(dynamic))) == 1
    attach_gates(net, widths, "weight")
    assert [path for path, _, _ in iterate_gates(net)] == ["mid", "last"]
