"""Layers of active channels: the same as masks, whoever computes them, and nothing else is looked at."""

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elastic.dynamic.activations import GRADED, Activation, find_active, ramp, scale
from elastic.dynamic.skipping import compiling, tiles
from elastic.dynamic.skipping.active import Active, list_all_channels
from elastic.dynamic.skipping.compiling import CACHE, load_kernel
from elastic.dynamic.skipping.convolution import ActiveConv2d, Method, list_methods
from elastic.dynamic.skipping.layers import activate_kernels, max_pool
from elastic.dynamic.skipping.native import call, get_workspace
from elastic.dynamic.skipping.tiles import PIXELS, STRIPS, TILES, choose_algorithm

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler"
)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=["kernel", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With the kernel, and as on a machine without a compiler."""
    if request.param == "kernel" and load_kernel() is None:
        pytest.skip("there is no C++ compiler")
    if request.param == "torch":
        monkeypatch.setattr(compiling, "load_kernel", lambda: None)
    yield


def mask(batch: int, channels: int, generator: torch.Generator) -> Tensor:
    """Of each sample at least one channel is on."""
    mask_BK = (torch.rand(batch, channels, generator=generator) > 0.5).float()
    mask_BK[torch.arange(batch), torch.randint(channels, (batch,), generator=generator)] = 1
    return mask_BK


def gates(batch: int, channels: int, generator: torch.Generator) -> Tensor:
    """What active channels are multiplied by, 0 for the others."""
    return mask(batch, channels, generator) * torch.rand(batch, channels, generator=generator).clamp(min=0.1)


def maps(mask_BK: Tensor) -> Tensor:
    return mask_BK[:, :, None, None]


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 4), channels=st.integers(1, 40))
@settings(max_examples=40)
def test_lists_are_masks(seed: int, batch: int, channels: int) -> None:
    gate_BK = gates(batch, channels, torch.Generator().manual_seed(seed))
    lists = Active.from_gates(gate_BK)
    for b in range(batch):
        assert lists.channel_BK[b, : lists.count_B[b]].tolist() == gate_BK[b].nonzero().flatten().tolist()
    for held, expected in zip(
        list_all_channels(batch, channels), Active.from_gates(torch.ones(batch, channels)), strict=True
    ):
        assert torch.equal(held, expected)


def some_convolution(method: Method, data: st.DataObject) -> None:
    """Any kernel, stride, border, size and gate, with and without a residual; what is off may be anything."""
    size = data.draw(st.sampled_from([1, 2, 3, 5, 7]))
    stride, pad = data.draw(st.integers(1, 3)), data.draw(st.integers(0, size // 2))
    height, width = (data.draw(st.sampled_from([1, 2, 4, 7, 8, 9, 14, 16, 20, 32])) for _ in range(2))
    algorithm = data.draw(st.sampled_from([PIXELS, TILES, STRIPS]))  # where a kernel is 3×3
    if algorithm != PIXELS:
        size, stride, pad = 3, 1, data.draw(st.integers(0, 3))
    height, width = (max(side, size - 2 * pad) for side in (height, width))
    batch, channels, kernels = (data.draw(st.integers(1, most)) for most in (20, 20, 40))
    relu, adds, bias = (data.draw(st.booleans()) for _ in range(3))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))

    conv = nn.Conv2d(channels, kernels, size, stride, pad, bias=bias)
    x_BCHW = torch.randn(batch, channels, height, width, generator=random)
    on_BC, gate_BK = mask(batch, channels, random), gates(batch, kernels, random)
    with torch.no_grad():
        expected = conv(x_BCHW * maps(on_BC)) * maps(gate_BK)
        residual = torch.randn(expected.shape, generator=random) if adds else None
        expected = expected if residual is None else expected + residual
        expected = (expected.relu() if relu else expected) * (maps(gate_BK) != 0)
        junk_BCHW = torch.where(maps(on_BC) != 0, x_BCHW, torch.nan)
        layer = ActiveConv2d(conv, relu, zeros=True, method=method)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "choose_algorithm", lambda *_: algorithm)
            found = layer(junk_BCHW, Active.from_gates(on_BC), Active.from_gates(gate_BK), residual)
        torch.testing.assert_close(found, expected, **CLOSE)
        layer.zeros = False
        found = layer(junk_BCHW, Active.from_gates(on_BC), Active.from_gates(gate_BK), residual)
        found = torch.where(maps(gate_BK) != 0, found, 0.0)
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("method", list_methods())
@given(data=st.data())
def test_a_convolution_of_active_channels_is_the_masked_one(method: Method, data: st.DataObject) -> None:
    some_convolution(method, data)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "flag",
    [
        pytest.param("-D__AVX512F__", id="sixteen"),
        pytest.param("-U__AVX512F__ -U__AVX__", id="four"),
    ],
)
def test_so_it_is_with_vectors_of_another_length(
    flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on other processors: the compiler puts vectors together that this one has not."""
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setattr(compiling, "FLAGS", (*compiling.FLAGS, "-O1", *flag.split()))
    kernel = load_kernel.__wrapped__()
    assert kernel is not None
    monkeypatch.setattr(compiling, "load_kernel", lambda: kernel)
    given(data=st.data())(some_convolution)("kernel")


@needs_compiler
@pytest.mark.parametrize("algorithm", [TILES, STRIPS])
@pytest.mark.parametrize("size", [(140, 6), (6, 140)])
def test_large_maps_are_tiled_in_strips(
    size: tuple[int, int], algorithm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(tiles, "choose_algorithm", lambda *_: algorithm)
    conv, x_BCHW = nn.Conv2d(65, 66, 3, padding=1), torch.randn(2, 65, *size)
    with torch.no_grad():
        torch.testing.assert_close(ActiveConv2d(conv, False, False)(x_BCHW), conv(x_BCHW), **CLOSE)


def test_tiles_are_chosen_where_transforms_are_shared_by_many_channels() -> None:
    assert choose_algorithm(64, 64, 8, 8) == TILES and choose_algorithm(3, 64, 8, 8) == PIXELS
    algorithms = [choose_algorithm(channels, channels, 16, 16) for channels in range(1, 200)]
    assert algorithms == sorted(algorithms) and (algorithms[0], algorithms[-1]) == (PIXELS, STRIPS)


@needs_compiler
def test_images_of_many_sizes_take_no_more_memory() -> None:
    """Weights are transformed once for each of the three ways, whatever the size."""
    layer = ActiveConv2d(nn.Conv2d(16, 16, 3, padding=1), relu=False)
    with patch.object(tiles, "transform_weight", side_effect=tiles.transform_weight) as transform:
        for side in range(3, 40):
            layer(torch.randn(1, 16, side, side))
    assert transform.call_count <= 3


@needs_compiler
@pytest.mark.parametrize(("size", "algorithm"), [(1, PIXELS), (3, PIXELS), (3, TILES), (3, STRIPS)])
def test_what_is_not_a_number_stays_so(size: int, algorithm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "choose_algorithm", lambda *_: algorithm)
    conv = nn.Conv2d(1, 1, size, padding=size // 2)
    with torch.no_grad():
        assert ActiveConv2d(conv, relu=True, zeros=True)(torch.full((1, 1, 8, 8), torch.nan)).isnan().all()


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_so_it_is_whatever_the_layout_and_the_threads(method: Method, threads: int) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    conv, x_BCHW = nn.Conv2d(48, 70, 3, padding=1), torch.randn(2, 48, 32, 32)
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            layer = ActiveConv2d(conv, relu=False, zeros=True, method=method)
            for layout in (torch.contiguous_format, torch.channels_last):
                for size in (32, 14, 8, 4, 2):
                    part = x_BCHW[:, :, :size, :size].contiguous(memory_format=layout)
                    torch.testing.assert_close(layer(part), conv(part), **CLOSE)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", list_methods())
def test_a_copy_has_weights_of_its_own(method: Method) -> None:
    torch.manual_seed(0)
    x_BCHW = torch.randn(1, 3, 8, 8)
    layer = ActiveConv2d(nn.Conv2d(3, 4, 3), relu=False, zeros=True, method=method)
    before = layer(x_BCHW)
    twin = copy.deepcopy(layer)
    layer.weight.zero_()
    assert torch.equal(twin(x_BCHW), before)
    del layer
    assert torch.equal(twin(x_BCHW), before)


@needs_compiler
def test_only_active_outputs_are_written() -> None:
    """The kernel leaves the others alone: that is the work that is not done."""
    conv = ActiveConv2d(nn.Conv2d(2, 3, 1), relu=False, zeros=False)
    x_BCHW, y_BKHW = torch.ones(1, 2, 4, 4), torch.full((1, 3, 4, 4), 7.0)
    lists, plan = Active.from_gates(torch.tensor([[1.0, 0, 1]])), conv._plan(4, 4)
    call(
        *("convolution", plan.shape, plan.weight, conv.bias, x_BCHW, None, y_BKHW, 1),
        *(*list_all_channels(1, 2)[:2], *lists, 0, 0, get_workspace(plan.work), 1),
    )
    assert (y_BKHW[:, 1] == 7).all() and (y_BKHW[:, ::2] != 7).all()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, stride=(1, 2)),
        nn.Conv2d(4, 4, 3, padding=(0, 1)),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 13),
        nn.Conv2d(4, 4, 3).double(),
        nn.Conv1d(4, 4, 3),
        nn.Linear(4, 4),
    ],
)
def test_other_layers_are_not_taken(layer: nn.Module) -> None:
    assert not ActiveConv2d.takes(layer)
    assert ActiveConv2d.takes(nn.Conv2d(4, 4, (3, 1), 2, 1))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("reads_all", [True, False])
@pytest.mark.parametrize("activation", ["soft", *GRADED])
def test_a_switch_engages_what_its_scores_say(reads_all: bool, activation: Activation) -> None:
    random = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(5, 6, 7, 9, generator=random)
    on_BC = torch.ones(5, 6) if reads_all else mask(5, 6, random)
    weight_KC, bias_K = torch.randn(8, 6, generator=random) * 4, torch.randn(8, generator=random)
    within_2C = torch.tensor([[-0.05, 0.01], [0.05, 0.1]]).repeat(1, 3)  # some means are beyond them
    mean_BC = (x_BCHW * maps(on_BC)).mean((2, 3)).clamp(*within_2C)
    expected = GRADED.get(activation, find_active)(F.linear(mean_BC, weight_KC, bias_K))
    junk_BCHW = torch.where(maps(on_BC) != 0, x_BCHW, torch.nan)
    found = activate_kernels(
        junk_BCHW, None if reads_all else Active.from_gates(on_BC), weight_KC, bias_K, within_2C, activation
    )
    torch.testing.assert_close(found.gate_BK, expected)
    assert torch.equal(found.gate_BK != 0, expected != 0)
    assert 0 < (expected != 0).float().mean() < 1
    for b, count in enumerate(found.count_B):
        assert found.channel_BK[b, :count].tolist() == expected[b].nonzero().flatten().tolist()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("activation", ["soft", *GRADED])
@pytest.mark.parametrize("where", ["a map", "a weight", "two weights", "infinite"])
def test_scores_that_are_no_numbers_are_as_torch_has_them(activation: Activation, where: str) -> None:
    """The highest was whatever came first; a kernel without a number as its gate was off."""
    random = torch.Generator().manual_seed(0)
    x_BCHW, weight_KC = torch.randn(3, 4, 5, 5, generator=random), torch.randn(6, 4, generator=random)
    bias_K, within_2C = torch.randn(6, generator=random), torch.tensor([[-9.0], [9.0]]).expand(2, 4)
    if where == "a map":
        x_BCHW[1, 2, 3, 3] = torch.nan
    else:
        value = torch.inf if where == "infinite" else torch.nan
        weight_KC[[3, 5] if where == "two weights" else [3], 0] = value
    mean_BC = x_BCHW.mean((2, 3)).clamp(*within_2C)
    expected = GRADED.get(activation, find_active)(F.linear(mean_BC, weight_KC, bias_K))
    found = activate_kernels(x_BCHW, None, weight_KC, bias_K, within_2C.contiguous(), activation)
    torch.testing.assert_close(found.gate_BK, expected, equal_nan=True)
    if activation != "soft" and where in ("a map", "two weights"):
        assert found.gate_BK.isnan().any()
    for b, count in enumerate(found.count_B):
        assert found.channel_BK[b, :count].tolist() == (expected[b] != 0).nonzero().flatten().tolist()


@pytest.mark.usefixtures("either")
def test_the_strongest_kernel_is_never_off() -> None:
    bias_K = torch.tensor([-3.0, -1, -2])
    for activation, gate in ("soft", 1.0), ("ramp", 1.0), ("scale", 0.5):
        found = activate_kernels(
            torch.randn(2, 4, 3, 3), None, torch.zeros(3, 4), bias_K, torch.zeros(2, 4), activation
        )  # type: ignore[arg-type]
        assert found.gate_BK.tolist() == [[0, gate, 0]] * 2
        assert GRADED.get(activation, find_active)(bias_K[None]).tolist() == [[0, gate, 0]]


@pytest.mark.parametrize(
    ("gate", "expected", "slope"),
    [
        (ramp, [0, 0.25, 0.5, 1, 1], [0, 1, 1, 0, 0]),  # fades, and is 1 at most
        (scale, [0, 0.75, 1, 3.5, 2.5], [0, 1, 1, 1, 1]),  # one half at least, without an upper end
    ],
)
def test_a_graded_gate_learns_where_kernels_are_on(
    gate: Callable[[Tensor], Tensor], expected: list[float], slope: list[float]
) -> None:
    score_BK = torch.tensor([[-1.0, 0.25, 0.5, 3, 2]], requires_grad=True)
    gate_BK = gate(score_BK)
    assert gate_BK.tolist() == [expected]
    gate_BK.sum().backward()
    assert score_BK.grad is not None and score_BK.grad.tolist() == [slope]


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    ("size", "stride", "side"),
    [(2, 2, 8), (2, 2, 9), (3, 2, 11), (3, 2, 10), (3, 1, 5), (5, 3, 7), (2, 3, 4), (2, 3, 5), (3, 2, 3)],
)
def test_pooling_of_active_maps(size: int, stride: int, side: int, padding: int, ceil: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x_BCHW, on_BC = torch.randn(3, 5, side, side, generator=random), mask(3, 5, random)
    junk_BCHW = torch.where(maps(on_BC) != 0, x_BCHW, torch.nan)
    found = max_pool(junk_BCHW, Active.from_gates(on_BC), size, stride, padding, ceil, zeros=True)
    expected = F.max_pool2d(x_BCHW, size, stride, padding, ceil_mode=ceil)
    assert torch.equal(found, expected * maps(on_BC))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 2), (3, 1)])
def test_pooling_of_what_is_no_number_is_as_torch_has_it(size: int, stride: int) -> None:
    """It was lost unless it came first."""
    random = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(2, 5, 16, 16, generator=random)
    drawn = torch.rand(x_BCHW.shape, generator=random)
    x_BCHW[drawn < 0.1], x_BCHW[drawn > 0.9] = torch.nan, torch.inf
    expected = F.max_pool2d(x_BCHW, size, stride, size // 2)
    found = max_pool(x_BCHW, list_all_channels(2, 5), size, stride, size // 2, zeros=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert 0.2 < expected.isnan().float().mean() < 0.8
