"""Compiled as a whole: one graph a network and shape, however many networks of its class there are."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes
from elastic.models import convnet, resnet20
from elastic.models.resnet import resnet
from elastic.training.compilation import compile_network
from elastic.widths.discovery import discover

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_sequence_is_one_graph() -> None:
    counter, net = CompileCounter(), resnet20().eval()
    with torch.no_grad():
        expected = net(X)
        compile_network(net, backend=counter)
        torch.testing.assert_close(net(X), expected, rtol=0, atol=0)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    assert (counter.frame_count, convolutions) == (1, 21)
    assert counter.op_count > convolutions


def test_names_and_copies_are_those_of_a_plain_network() -> None:
    net = convnet(in_channels=3)
    names = list(net.state_dict())
    compile_network(net, backend="eager")
    assert list(net.state_dict()) == names
    assert copy.deepcopy(net)._compiled_call_impl is None


@pytest.mark.slow
def test_every_level_is_compiled_once_however_often_they_are_switched() -> None:
    """Eleven of one class: more than torch keeps for one code object."""
    net = resnet(1, width=20)
    widths = discover(net, X)
    sizes = level_sizes(net, widths, X, [0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9])
    levels, counter = Levels(net, widths, sizes), CompileCounter()
    with torch.inference_mode():
        expected = [level.eval()(X) for level in levels]
        for level in levels:
            compile_network(level, backend=counter)
        for _ in range(3):
            for level, said in zip(levels, expected, strict=True):
                torch.testing.assert_close(level(X), said, rtol=0, atol=0)
            assert counter.frame_count == len(levels) == 11


def test_the_networks_tensors_are_read_where_they_are() -> None:
    """What the network learns later, a compiled level says too, without being compiled again."""
    net = convnet(in_channels=3)
    widths = discover(net, X)
    levels, counter = Levels(net, widths, level_sizes(net, widths, X, [0.5])), CompileCounter()
    level = levels[0].eval()
    compile_network(level, backend=counter)
    with torch.no_grad():
        before = level(X)
        next(net.parameters()).mul_(2)
        after = level(X)
    assert not torch.equal(before, after)
    assert counter.frame_count == 1
