"""Convolutions of which blocks are shut: the same as stock torch's, and what is shut is not looked at."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elastic.dynamic.skipping import blocks, make_skipping, tiles
from elastic.dynamic.skipping.active import Active
from elastic.dynamic.skipping.blocks import find_blocks
from elastic.dynamic.skipping.compiling import load_kernel
from elastic.dynamic.skipping.convolution import ActiveConv2d
from elastic.models import convnet
from elastic.pruning.compaction import compact
from elastic.pruning.gates import BLOCK, attach_gates, iterate_gates
from elastic.widths.discovery import discover

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
needs_kernel = pytest.mark.skipif(load_kernel() is None, reason="there is no C++ compiler")


def shut_blocks(weight: Tensor, share: float, random: torch.Generator) -> None:
    """Shut blocks of outputs, the last of which may be smaller."""
    kernels, channels, *_ = weight.shape
    is_open = torch.rand(-(-kernels // BLOCK), channels, generator=random) > share
    weight.data.mul_(is_open.repeat_interleave(BLOCK, 0)[:kernels, :, None, None])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@needs_kernel
@given(data=st.data())
@settings(max_examples=12)
def test_a_convolution_with_closed_blocks_is_stock_torch_s(data: st.DataObject) -> None:
    """Any size; blocks that read nothing have only their bias; sums and ReLUs stay."""
    size, stride = data.draw(st.sampled_from([1, 3, 3, 5])), data.draw(st.integers(1, 2))
    batch, channels, kernels = (data.draw(st.integers(1, most)) for most in (3, 12, 30))
    relu, adds = data.draw(st.booleans()), data.draw(st.booleans())
    algorithm = data.draw(st.sampled_from([tiles.PIXELS, tiles.TILES, tiles.STRIPS]))  # where a kernel is 3×3
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    conv = nn.Conv2d(channels, kernels, size, stride, size // 2)
    shut_blocks(conv.weight, data.draw(st.sampled_from([0.3, 0.7, 1.0])), random)
    x_BCHW = torch.randn(batch, channels, 9, 7, generator=random)
    with torch.no_grad():
        expected = conv(x_BCHW)
        residual = torch.randn(expected.shape, generator=random) if adds else None
        expected = expected if residual is None else expected + residual
        expected = expected.relu() if relu else expected
        with pytest.MonkeyPatch.context() as patch, threads(data.draw(st.integers(1, 2))):
            patch.setattr(blocks, "WORTH", 10.0)  # however little it saves
            patch.setattr(tiles, "choose_algorithm", lambda *_: algorithm)
            layer = ActiveConv2d(conv, relu)
            assert layer.blocks
            torch.testing.assert_close(layer(x_BCHW, None, None, residual), expected, **CLOSE)
        gate_BK = torch.rand(batch, kernels, generator=random)
        engaged = layer(x_BCHW, None, Active.from_gates(gate_BK))
        masked = F.conv2d(x_BCHW, conv.weight, conv.bias, stride, size // 2) * gate_BK[:, :, None, None]
        torch.testing.assert_close(engaged, masked.relu() if relu else masked, **CLOSE)


@needs_kernel
def test_what_a_block_does_not_read_is_not_looked_at() -> None:
    conv = nn.Conv2d(4, 3 * BLOCK, 3, padding=1)
    conv.weight.data[:BLOCK, 1:] = 0
    conv.weight.data[BLOCK:, 0] = 0
    x_BCHW = torch.randn(1, 4, 8, 8)
    x_BCHW[:, 0] = torch.inf
    y_BKHW = ActiveConv2d(conv, relu=False)(x_BCHW)
    assert not y_BKHW[:, :BLOCK].isfinite().any() and y_BKHW[:, BLOCK:].isfinite().all()


def test_what_saves_nothing_is_convolved_at_once() -> None:
    """Scattered zeros leave each output inputs of its own, and one by one they take longer."""
    conv, random = nn.Conv2d(16, 4 * BLOCK, 3), torch.Generator().manual_seed(0)
    assert find_blocks(conv.weight) is None
    shut_blocks(conv.weight, 0.7, random)
    assert find_blocks(conv.weight)
    conv.weight.data = torch.randn(4 * BLOCK, 16, 3, 3, generator=random)
    conv.weight.data[torch.rand(4 * BLOCK, 16, generator=random) < 0.5] = 0
    assert find_blocks(conv.weight) is None


@needs_kernel
def test_a_network_that_was_gated_in_blocks_leaves_them_out() -> None:
    torch.manual_seed(0)
    net, x_BCHW = convnet((2 * BLOCK, 3 * BLOCK, 3 * BLOCK)).eval(), torch.randn(2, 1, 12, 12)
    attach_gates(net, discover(net, x_BCHW), "block")
    for _, _, gate in iterate_gates(net):
        shut = torch.rand(-(-len(gate.score) // BLOCK), gate.score.shape[1]) < 0.6
        gate.score.data[shut.repeat_interleave(BLOCK, 0)[: len(gate.score)]] = -1
    small = compact(net, x_BCHW)
    fast = make_skipping(small, method="kernel")
    with torch.no_grad():
        torch.testing.assert_close(fast(x_BCHW), net(x_BCHW), **CLOSE)
    assert any(layer.blocks for layer in fast.modules() if isinstance(layer, ActiveConv2d))
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        assert torch.equal(copied(x_BCHW), fast(x_BCHW))
