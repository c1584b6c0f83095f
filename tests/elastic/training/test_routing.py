"""A network's calls run what a run trains, and bring further losses with them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from elastic.training.routing import Router, add_loss


class Plain:
    """Run a network as it is."""

    def __init__(self, net: nn.Module, scale: float | None = 1.0) -> None:
        self.net, self.scale = net, scale

    def run_active(self, *args: Any, **kwargs: Any) -> Any:
        return self.net._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    def compute_loss_scale(self) -> float | None:
        return self.scale


def penalise(output: Tensor, x: Tensor) -> Tensor:
    return (output * x.mean()).square().mean()


@pytest.mark.parametrize("scale", [1.0, 0.5, 1024.0])
def test_the_gradient_is_that_of_the_sum_of_losses(scale: float) -> None:
    """The oracle adds the term to the loss, which is multiplied as a gradient scaler does."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    other = copy.deepcopy(net)
    Router(net, Plain(net, scale), [penalise]).install()
    (scale * net(x).sum()).backward()
    output = other(x)
    (scale * (output.sum() + penalise(output, x))).backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_term_that_needs_other_parameters_reaches_them() -> None:
    output, weight = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    add_loss(output * 2, (weight**2).sum(), 1.0).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [2, 2, 2]
    assert output.grad is not None and output.grad.tolist() == [2, 2]


class Boxed:
    """Hold what a network gives, as programs' own classes do."""

    def __init__(self, maps: Tensor) -> None:
        self.maps, self.name = {"all": maps}, "boxed"


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dictionary": (lambda x: {"out": x}, lambda output: output["out"]),
    "tuple": (lambda x: (torch.ones(1), [x]), lambda output: output[1][0]),
    "list": (lambda x: [x], lambda output: output[0]),
    "object": (lambda x: [Boxed(x)], lambda output: output[0].maps["all"]),
    "distribution": (lambda x: Normal(x, 1.0), lambda output: output.loc),
    "distribution of another": (lambda x: Independent(Normal(x, 1.0), 1), lambda output: output.mean),
}


@pytest.mark.parametrize(("wrap", "read"), FORMS.values(), ids=FORMS)
def test_outputs_of_any_form_carry_it(wrap: Callable[[Tensor], Any], read: Callable[[Any], Tensor]) -> None:
    leaf, weight = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    given = wrap(2 * leaf)
    output = add_loss(given, weight.sum(), 1.0)
    assert type(output) is type(given)
    read(given).sum().backward(retain_graph=True)
    assert weight.grad is None, "what the network gave stays as it was"
    read(output).sum().backward()
    assert weight.grad is not None


def test_an_output_that_is_there_twice_carries_it_once() -> None:
    leaf, weight = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    double = 2 * leaf
    first, second = add_loss([double, {"again": double}], weight.sum(), 1.0)
    assert second["again"] is first
    (first.sum() + second["again"].sum()).backward()
    assert weight.grad is not None and weight.grad.tolist() == [1]


def test_outside_of_training_no_term_is_asked_for() -> None:
    net = nn.Linear(2, 2)

    def refuse(output: Tensor, x: Tensor) -> Tensor:
        raise AssertionError

    Router(net, Plain(net, None), [refuse]).install()
    net(torch.ones(1, 2))
    Router(net, Plain(net, 1.0), [refuse]).install()
    with torch.no_grad():
        net(torch.ones(1, 2))


def test_copies_and_traces_of_a_network_are_without_it() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    Router(net, Plain(net), []).install()
    assert copy.deepcopy(net)._compiled_call_impl is None
    assert "router" not in torch.fx.symbolic_trace(net).code.lower()


def test_a_call_is_put_back_unless_something_else_has_taken_its_place() -> None:
    net = nn.Linear(2, 2)
    for before in (None, lambda x: x):
        net._compiled_call_impl = before
        router = Router(net, Plain(net), [])
        router.install()
        router.remove()
        assert net._compiled_call_impl is before
    router.install()
    net._compiled_call_impl = later = torch.neg
    router.remove()
    assert net._compiled_call_impl is later
