"""Calls of the kernel that are replayed say what the layers say, whatever changes between inputs."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, fx, nn

from elastic.dynamic.modules import select_set
from elastic.dynamic.skipping import make_skipping, native, rewrite
from elastic.dynamic.skipping.compiling import load_kernel
from elastic.dynamic.skipping.convolution import ActiveConv2d
from elastic.dynamic.skipping.replay import MAX_SAMPLES, MAX_TAPES, Replayed
from elastic.errors import StructureError
from elastic.models import resnet20
from tests.elastic.dynamic.gated import gated
from tests.elastic.zoo import randomised

pytestmark = pytest.mark.skipif(load_kernel() is None, reason="there is no C++ compiler")


def images(batch: int = 1, side: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network() -> fx.GraphModule:
    return gated(randomised(resnet20()).eval(), images(2), sets=2)


def calls(net: nn.Module, x_BCHW: Tensor) -> int:
    """How often Python calls the kernel for one input."""
    with pytest.MonkeyPatch.context() as patch:
        seen: list[int] = []
        run = native._run
        patch.setattr(native, "_run", lambda steps: (seen.append(len(steps)), run(steps)))
        net(x_BCHW)
    return len(seen)


def test_a_residual_network_is_one_call(network: fx.GraphModule) -> None:
    fast, slow, x_1CHW = make_skipping(network), rewrite(network), images()
    with torch.inference_mode():
        fast(x_1CHW)
        assert calls(fast, x_1CHW) == 1
        assert calls(slow, x_1CHW) > 20


def test_sizes_sets_and_modes_may_change_between_inputs(network: fx.GraphModule) -> None:
    """More shapes than tapes are kept, in both modes of torch, with either set, in any layout."""
    fast, slow = make_skipping(network), rewrite(network)
    for seed in range(MAX_TAPES + 4):
        x_BCHW = images(1 + seed % (MAX_SAMPLES + 2), 8 + 4 * (seed % 3), seed)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last) if seed % 2 else x_BCHW
        select_set(fast, seed % 2)
        select_set(slow, seed % 2)
        with torch.inference_mode(seed % 4 < 2):
            assert torch.equal(fast(x_BCHW), slow(x_BCHW))


def test_results_are_the_callers_own(network: fx.GraphModule) -> None:
    fast = make_skipping(network)
    replayed = next(m for m in fast.modules() if isinstance(m, Replayed))  # of the set that rules
    with torch.no_grad():
        (first,) = replayed(images(seed=1))
        held = first.clone()
        replayed(images(seed=2))
    assert torch.equal(first, held)


def test_memory_is_used_again(network: fx.GraphModule) -> None:
    """Of some twenty layers' maps no more is kept than a block's."""
    x_BCHW = images(2)
    with torch.no_grad():
        tape = native.Tape([x_BCHW], lambda inputs: [rewrite(network)(*inputs)])
    largest = max(map(len, tape.memory.values()))
    assert sum(map(len, tape.memory.values())) < 5 * largest
    assert len(tape.steps) > 20


def test_threads_do_not_meet(network: fx.GraphModule) -> None:
    fast, slow = make_skipping(network), rewrite(network)
    inputs = [images(seed=seed) for seed in range(40)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fast, inputs))
        assert all(torch.equal(y, slow(x)) for x, y in zip(inputs, found, strict=True))


def test_a_copy_has_weights_of_its_own(network: fx.GraphModule) -> None:
    fast = make_skipping(network)
    with torch.no_grad():
        before = fast(images())
        twin = copy.deepcopy(fast)
        for layer in fast.modules():
            if isinstance(layer, ActiveConv2d):
                layer.weight.zero_()
        assert torch.equal(twin(images()), before)
        assert not torch.equal(fast(images()), before)


class Placed(nn.Module):
    """Adds one map a channel to those of all samples."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)
        self.three, self.head = nn.Conv2d(channels, 6, 3), nn.Linear(6, 4)
        self.place = nn.Parameter(torch.randn(channels, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = (self.two(self.one(x).relu()) + self.place).relu()
        return self.head(self.three(y).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [MAX_SAMPLES + 1, 2 * MAX_SAMPLES])
def test_what_is_added_to_all_samples_is_none_of_them(batch: int) -> None:
    """Though it has as many entries as there are samples."""
    net = gated(Placed(batch).eval(), images(2))
    with torch.no_grad():
        torch.testing.assert_close(
            make_skipping(net)(images(batch)), net(images(batch)), rtol=1e-4, atol=1e-5
        )


def test_other_inputs_are_refused_in_one_line(network: fx.GraphModule) -> None:
    with torch.no_grad(), pytest.raises(StructureError, match=r"fp32 inputs on the CPU, not torch\.float64"):
        make_skipping(network)(images().double())
