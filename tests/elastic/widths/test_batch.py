"""Numbers that a forward computes from the number of samples, in traces that are run on other batches."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elastic import attach_gates, discover
from elastic.errors import StructureError
from elastic.widths.tracing import trace_both_modes
from tests.elastic.zoo import Net, conv

SAMPLES = 2
X = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Forward = Callable[[Any, Tensor], Any]


def put_windows_together(m: Any, x: Tensor) -> Tensor:
    """As Swin does, arXiv 2103.14030."""
    _, channels, height, width = x.shape
    y = x.view(-1, channels, height // 4, 4, width // 4, 4).permute(0, 2, 4, 3, 5, 1)
    windows = y.reshape(-1, 4, 4, channels)
    samples = int(windows.shape[0] / (height * width / 4 / 4))
    return windows.view(samples, height // 4, width // 4, 4, 4, -1).mean((1, 2, 3, 4))


def average_over_samples(m: Any, x: Tensor) -> Tensor:
    return x.sum(0, keepdim=True) / float(x.shape[0]) + x


def pair_halves(m: Any, x: Tensor) -> Tensor:
    both = torch.cat([x, x.flip(3)])
    half = int(len(both) / 2)
    return both[:half] * both[half:]


FORWARDS: dict[str, Forward] = {
    "len": lambda m, x: x.view(len(x), -1),
    "int": lambda m, x: x.reshape(int(x.shape[0]), -1),
    "keyword": lambda m, x: x.new_zeros(size=[int(x.size(0)), 4]) + x.mean((2, 3)),
    "product": lambda m, x: x.reshape(int(np.prod(x.shape)) // 256, 256),
    "ceil": lambda m, x: x.view(math.ceil(x.shape[0]), -1),
    "windows": put_windows_together,
    "average": average_over_samples,
    "halves": pair_halves,
    "beside a constant": lambda m, x: x.view(len(x), -1) * torch.tensor([0.5, 2.0]).repeat(128),
    "moved": lambda m, x: x.to(next(m.parameters()).device).view(len(x), -1),
    "moved, without a number": lambda m, x: x.to(next(m.parameters()).device).mean((2, 3)),
    "moved by name": lambda m, x: x.cpu().to("cpu", x.dtype).view(len(x), -1),
    "made a tensor": lambda m, x: torch.as_tensor(x, device=next(m.parameters()).device).mean((2, 3)),
    "first": lambda m, x: x[: int(len(x) * 1.0)].mean((2, 3)),
    "squares": lambda m, x: (x.new_ones(int(x.shape[0]) ** 2) * x.mean()).view(x.shape[0], -1),
    "rounded up": lambda m, x: x.mean() + x.new_ones(int(x.shape[0] / 2 + 0.5)),
}


def make_net(forward: Forward) -> nn.Module:
    torch.manual_seed(0)
    net = Net(lambda m, x: forward(m, m.stem(x)), stem=conv(3, 4))
    return net.double()


@pytest.mark.sampled(12)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_a_trace_is_right_for_batches_of_any_size(forward: Forward, training: bool) -> None:
    net = make_net(forward).train(training)
    traced = trace_both_modes(net, X[:SAMPLES].double().to("meta"))
    for samples in (1, 2, 3, 7):
        x = X[:samples].double()
        torch.testing.assert_close(traced(x), net(x), rtol=0, atol=1e-15)


REFUSED: dict[str, Forward] = {
    "range": lambda m, x: torch.stack([x[i].mean() for i in range(len(x))]),
    "iteration": lambda m, x: torch.stack([sample.mean() for sample in x]),
    "unbind": lambda m, x: torch.stack([sample.mean() for sample in x.unbind(0)]),
    "squares": lambda m, x: (x.new_ones(round(x.shape[0]) ** 2) * x.mean()).view(x.shape[0], -1),
    "constant": lambda m, x: x.view(len(x), -1) / torch.tensor(float(len(x))),
    "rounded up": lambda m, x: x.mean() + x.new_ones(round(x.shape[0] / 2 + 0.1)),
}


@pytest.mark.parametrize("forward", REFUSED.values(), ids=REFUSED)
def test_a_forward_that_is_another_one_for_other_batches_is_refused(forward: Forward) -> None:
    with pytest.raises(StructureError, match=r"^Net can be traced for 2 samples alone: let its forward"):
        trace_both_modes(make_net(forward), X[:SAMPLES].double().to("meta"))


def test_a_network_that_takes_no_other_batch_is_traced_for_it() -> None:
    net = make_net(lambda m, x: x.view(SAMPLES, 4 * 64) * int(x.shape[0]))
    x = X[:SAMPLES].double()
    torch.testing.assert_close(trace_both_modes(net, x.to("meta"))(x), net(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.stem(x).view(len(x), -1) * scale
        return y


def test_an_input_for_all_samples_says_nothing_of_their_number() -> None:
    """The number of samples is that of the first input with any dimension, which here is a number."""
    net, scale = Scaled(), torch.tensor(2.0)
    traced = trace_both_modes(net, scale.to("meta"), X[:SAMPLES].to("meta"))
    torch.testing.assert_close(traced(scale, X), net(scale, X))


def test_constants_of_a_network_without_data_are_compared_by_shape() -> None:
    net = Net(lambda m, x: m.last(m.stem(x) * m.scales[1]).view(len(x), -1), stem=conv(3, 4), last=conv(4, 2))
    net.scales = torch.tensor([0.5, 2.0])  # no buffer
    expected = net(X)
    attach_gates(net, discover(net, X), "channel")
    assert torch.equal(net(X), expected)
