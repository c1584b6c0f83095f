"""The penalty's gradient against autograd of `compute_penalty`, and the number of its calls."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.models import convnet, resnet20
from elastic.pruning import gates
from elastic.pruning.gates import Grain
from elastic.pruning.penalty import add_penalty_gradient
from elastic.widths.discovery import discover
from tests.elastic.pruning.grains import every_grain
from tests.elastic.pruning.sums import compute_penalty

CALLS = 12


class CountCalls(TorchDispatchMode):
    """Count the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def gated_net(grain: Grain, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give a network whose gates have scores, prices and grace of their own."""
    net = convnet((4, 6, 6, 8)).to(dtype)
    gates.attach_gates(net, discover(net, torch.zeros(1, 1, 12, 12, dtype=dtype)), grain)
    draw = torch.Generator().manual_seed(0)
    for i, (_, _, gate) in enumerate(gates.iterate_gates(net)):
        gate.price = 0.5 + i
        gate.score.data.copy_(3 * torch.randn(gate.score.shape, generator=draw))
        gate.grace.copy_(torch.randint(-1, 3, gate.grace.shape, generator=draw).clamp(min=0))
        if gate.block is not None:  # whose gates are all alike
            firsts_K = gates.find_firsts(gate.block)
            gate.score.data.copy_(gate.score.data.index_select(gate.channel, firsts_K))
            gate.grace.copy_(gate.grace.index_select(gate.channel, firsts_K))
    return net


def train(net: nn.Module) -> nn.Module:
    """Give each score a gradient, of zeros, as a step does that needs none of them to move."""
    for _, _, gate in gates.iterate_gates(net):
        gate.score.grad = torch.zeros_like(gate.score)
    return net


def gradients(net: nn.Module) -> list[Tensor | None]:
    return [gate.score.grad for _, _, gate in gates.iterate_gates(net)]


@every_grain
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_is_that_of_autograd(grain: Grain, dtype: torch.dtype) -> None:
    net = train(gated_net(grain, dtype))
    add_penalty_gradient(gates.iterate_gates(net), 1e-2)
    by_hand = gradients(net)
    net.zero_grad()
    (1e-2 * compute_penalty(net)).backward()
    for actual, expected in zip(by_hand, gradients(net), strict=True):
        assert actual is not None and expected is not None and actual.dtype == dtype
        torch.testing.assert_close(actual, expected)
    assert any(bool((grad == 0).any()) for grad in by_hand if grad is not None), "grace spares some"


@every_grain
def test_it_is_added_to_what_the_loss_asks_for(grain: Grain) -> None:
    """What the loss does not ask, since no gradient comes to it, would be shut whatever it is worth."""
    net = train(gated_net(grain))
    alone = train(copy.deepcopy(net))
    add_penalty_gradient(gates.iterate_gates(alone), 1e-2)
    first, second, *_ = (gate for _, _, gate in gates.iterate_gates(net))
    first.score.grad = torch.ones_like(first.score)
    before = first.score.grad
    second.score.grad = None
    add_penalty_gradient(gates.iterate_gates(net), 1e-2)
    assert first.score.grad is before, "others may hold it"
    for i, (grad, expected) in enumerate(zip(gradients(net), gradients(alone), strict=True)):
        assert expected is not None
        if i == 1:
            assert grad is None
        else:
            assert grad is not None
            torch.testing.assert_close(grad, expected + (i == 0))


def test_the_memory_format_of_a_gradient_is_the_scores() -> None:
    net = train(gated_net("weight").to(memory_format=torch.channels_last))
    add_penalty_gradient(gates.iterate_gates(net), 1e-2)
    scores = [gate.score for _, _, gate in gates.iterate_gates(net) if gate.score.dim() == 4]
    for tensor in (*scores, *(score.grad for score in scores)):
        assert tensor is not None and tensor.is_contiguous(memory_format=torch.channels_last)


def test_without_gates_there_is_nothing_to_do() -> None:
    add_penalty_gradient(gates.iterate_gates(convnet()), 1e-2)
    net = gated_net("kernel")
    gates.freeze_gates(net)
    add_penalty_gradient(gates.iterate_gates(net), 1e-2)
    assert gradients(net) == [None] * 5


def test_there_are_few_calls_however_many_layers() -> None:
    for net, x in ((resnet20(), torch.zeros(1, 3, 32, 32)), (convnet(), torch.zeros(1, 1, 12, 12))):
        gates.attach_gates(net, discover(net, x), "weight")
        compute_penalty(net).backward()
        with CountCalls() as counter:
            add_penalty_gradient(gates.iterate_gates(net), 1e-4)
        assert len(counter.calls) <= CALLS, counter.calls
