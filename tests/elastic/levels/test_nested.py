"""Levels against networks cut out by re-indexing, against arithmetic by hand, and against their storage."""

import copy
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from elastic.errors import StructureError
from elastic.levels.alone import make_alone
from elastic.levels.cutting import cut_tensors, extract_level, find_nestable, is_view
from elastic.levels.nested import Levels
from elastic.pruning import gates
from elastic.pruning.folding import fold_gates
from elastic.surgery.layers import NORMS
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover
from elastic.widths.operations.interface import is_stored
from elastic.widths.width import Widths
from tests.elastic.levels.nets import (
    built,
    close,
    entries,
    evaluated,
    every_net,
    example,
    extracted,
    halves,
    inside,
    nested,
    norms,
    placed,
    shared,
    some_nets,
    step,
)
from tests.elastic.zoo import CASES, STORED, Case, Net, conv, head, randomised

WHOLE = {"weight_norm"}  # of which no level can have a part
case_with_levels = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@st.composite
def ascending(draw: Any, widths: Widths, most: int = 3) -> list[dict[str, int]]:
    """Sizes of one level or more below the network, each a part of the next."""
    count = draw(st.integers(1, most))
    names = find_nestable(widths)
    columns = {n: sorted(draw(_columns(widths[n].size, count))) for n in names}
    rows = [{n: columns[n][k] for n in names} for k in range(count)]
    full = {n: widths[n].size for n in names}
    rows = [row for k, row in enumerate(rows) if row != full and row not in rows[:k]]
    assume(rows)
    return rows


def _columns(size: int, count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, size), min_size=count, max_size=count)


# --- what a level is -------------------------------------------------------------------------------------


@pytest.mark.sampled(10)
@case_with_levels
@given(data=st.data())
@settings(max_examples=2)
def test_a_level_says_what_a_network_of_its_size_and_norms_says(case: Case, data: st.DataObject) -> None:
    net, x = case.model(), case.example()
    widths = discover(net, x)
    if not find_nestable(widths):
        return
    levels = evaluated(nested(net, widths, data.draw(ascending(widths))))
    inside(levels)
    for k, level in enumerate(levels):
        own = extracted(levels, k)
        assert repr(level) == repr(own) and type(level) is type(net)
        close(level(x), own(x))
        close(levels.run(k, x), own(x))


@pytest.mark.sampled(4)
@every_net
@given(data=st.data())
@settings(max_examples=2)
def test_so_it_is_in_networks_of_many_kinds(name: str, data: st.DataObject) -> None:
    net, x, widths = built(name)
    levels = evaluated(nested(net, widths, data.draw(ascending(widths))))
    inside(levels)
    for k, level in enumerate(levels):
        own = extracted(levels, k)
        assert repr(level) == repr(own)
        close(level(x), own(x))
        close(levels.run(k, x), own(x))


def test_all_cases_but_those_named_have_widths_to_cut() -> None:
    found = {n for n, c in CASES.items() if not find_nestable(discover(c.model(), c.example()))}
    assert found == WHOLE


def test_by_hand_on_two_convolutions() -> None:
    torch.manual_seed(0)
    net = randomised(nn.Sequential(conv(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5, 3), head(5)))
    levels = evaluated(nested(net, discover(net, example("convnet")), [{"0": 2, "3": 3}, {"0": 4}]))
    x = example("convnet")
    for k, (first, second) in enumerate([(2, 3), (4, 5)]):
        a, b = torch.arange(first), torch.arange(second)
        own: Any = levels.norms[k]["1"]  # type: ignore[index]
        h = F.conv2d(x, net[0].weight.index_select(0, a), net[0].bias.index_select(0, a), padding=1)
        h = F.batch_norm(h, own.running_mean, own.running_var, own.weight, own.bias).relu()
        weight = net[3].weight.index_select(0, b).index_select(1, a)
        h = F.conv2d(h, weight, net[3].bias.index_select(0, b), padding=1).mean((2, 3))
        close(levels[k](x), F.linear(h, net[4][2].weight.index_select(1, b), net[4][2].bias))


@every_net
def test_a_level_costs_the_memory_of_its_norms(name: str) -> None:
    net, _, widths = built(name)

    def storage(*tensors: Tensor) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    before = storage(*net.parameters(), *net.buffers())
    levels = Levels(net, widths, halves(widths, 0.4, 0.8))
    own = sum(t.nbytes for t in (*levels.norms.parameters(), *levels.norms.buffers()))
    held = [t for level in levels for t in (*level.parameters(), *level.buffers())]
    copied = sum(
        level.get_parameter(".".join(key)).nbytes
        for level, cut in zip(levels[:-1], levels.cuts, strict=False)
        for key, part in cut.items()
        if not is_view(part) and key[0] not in norms(net)
    )
    assert storage(*held) == before + own + copied
    assert (copied > 0) == (name in ("densenet", "resnext"))


@every_net
def test_what_the_network_learns_the_levels_have(name: str) -> None:
    net, x, widths = built(name)
    levels = evaluated(nested(net, widths, halves(widths, 0.4, 0.8)))
    before = [level(x) for level in levels]
    with torch.no_grad():
        for parameter in (
            p for m in net.modules() if not isinstance(m, NORMS) for p in m._parameters.values()
        ):
            if parameter is not None:
                parameter.mul_(1.5).add_(0.01)
    for k, level in enumerate(levels):
        assert not torch.allclose(level(x), before[k], rtol=1e-3)
        close(level(x), extracted(levels, k)(x))


def test_a_sequence_of_modules_the_last_one_the_network_itself() -> None:
    net, _, widths = built("convnet")
    levels = Levels(net, widths, halves(widths, 0.4, 0.8))
    assert len(levels) == len(list(levels)) == 3 and levels[-1] is levels[2] is net
    assert levels[:2] == [levels[0], levels[1]] and levels.sizes[-1] == widths.sizes()
    assert not any(p.requires_grad for _, p in shared(levels[0]) if p.shape != (5,)), "train through `run`"
    assert all(p.requires_grad for p in levels.norms.parameters())
    again = Levels(net, widths, levels.sizes[:-1])
    assert again.norms.state_dict().keys() == levels.norms.state_dict().keys()
    for a, b in zip(again.norms.parameters(), levels.norms.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b


def test_a_width_that_is_left_out_stays_whole() -> None:
    net, _, widths = built("convnet")
    levels = Levels(net, widths, [{"0": 3}])
    assert levels.sizes[0] == widths.sizes() | {"0": 3}
    assert levels[0][0].out_channels == 3 and levels[0][3].out_channels == net[3].out_channels


def test_a_network_without_norms() -> None:
    net, x, widths = built("alexnet")
    levels = evaluated(Levels(net, widths, halves(widths, 0.3, 0.6)))
    assert not list(levels.norms.parameters()) and len(levels.norms) == 2
    for k, level in enumerate(levels):
        close(level(x), extracted(levels, k)(x))


# --- training ----------------------------------------------------------------------------------------------


def check_gradients(net: nn.Module, x: Tensor, sizes: list[dict[str, int]]) -> None:
    """Those of `Levels.run` are the extracted network's, in the prefix, and zero elsewhere."""
    levels = nested(net.double().train(), discover(net, x.double()), sizes)
    levels.norms.double()
    x = x.double()
    for k in range(len(levels) - 1):
        net.zero_grad()
        levels.norms.zero_grad()
        own = extracted(levels, k)
        assert torch.allclose(step(lambda x, k=k: levels.run(k, x), x), step(own, x), rtol=1e-9)
        theirs, numbers = {name: p.grad for name, p in own.named_parameters()}, entries(levels, k)
        for path, norm in norms(net).items():
            for name, parameter in norm.named_parameters():
                assert parameter.grad is None, "the network's own norms take no part"
                its: Any = levels.norms[k][path.replace(".", "/")].get_parameter(name)  # type: ignore[index]
                torch.testing.assert_close(its.grad, theirs.pop(f"{path}.{name}"), rtol=1e-8, atol=1e-12)
        for name, parameter in net.named_parameters():
            if name in theirs:
                assert parameter.grad is not None, name
                expected = placed(theirs[name], parameter, numbers[name])  # type: ignore[arg-type]
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-12)
        others = [levels.norms[j] for j in range(len(levels) - 1) if j != k]
        assert all(p.grad is None for norm in others for p in norm.parameters())


@pytest.mark.sampled(10)
@case_with_levels
@given(data=st.data())
@settings(max_examples=2)
def test_gradients_are_those_of_the_extracted_network(case: Case, data: st.DataObject) -> None:
    net, x = case.model(), case.example()
    if widths := find_nestable(found := discover(net, x)):
        assert widths
        check_gradients(net, x, data.draw(ascending(found, most=2)))


@pytest.mark.sampled(4)
@every_net
def test_gradients_are_so_in_networks_of_many_kinds(name: str) -> None:
    net, x, widths = built(name)
    check_gradients(net, torch.cat([x, example(name, 2)]), halves(widths, 0.3, 0.7))


class Checkpointed(nn.Module):
    """Compute a part of the forward again in the backward pass, and keep none of it until then."""

    def __init__(self, is_reentrant: bool) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 8), head(6)
        self.block = nn.Sequential(nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6), nn.ReLU())
        self.is_reentrant = is_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.is_reentrant:  # which needs an input with a gradient
            return self.head(checkpoint(self.block, self.stem(x), use_reentrant=True))  # type: ignore[no-any-return]
        return self.head(checkpoint(self._run_both, x, use_reentrant=False))  # type: ignore[no-any-return]

    def _run_both(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_what_is_computed_again_in_the_backward_pass_is_of_the_level(is_reentrant: bool) -> None:
    net, x = randomised(Checkpointed(is_reentrant)), torch.randn(4, 3, 6, 6)
    check_gradients(net, x, halves(discover(net, x), 0.3, 0.7))


def test_levels_that_are_trained_together_are_computed_again_each_for_itself() -> None:
    net, x = randomised(Checkpointed(False)).train(), torch.randn(4, 3, 6, 6)
    levels = Levels(net, widths := discover(net, x), halves(widths, 0.3, 0.7))
    before = [list(level.parameters()) for level in levels]
    expected = []
    for k in (0, 1, 0):
        net.zero_grad()
        levels.run(k, x).square().mean().backward()
        expected.append([0 if p.grad is None else p.grad.clone() for p in net.parameters()])
    net.zero_grad()
    sum(levels.run(k, x).square().mean() for k in (0, 1, 0)).backward()  # type: ignore[union-attr]
    for p, gradients in zip(net.parameters(), zip(*expected, strict=True), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, sum(gradients))
    for level, parameters in zip(levels, before, strict=True):
        assert all(map(operator.is_, level.parameters(), parameters)), "they have their own again"


def test_the_networks_own_gradient_is_plain() -> None:
    net, x, widths = built("convnet")
    twin = copy.deepcopy(net)
    levels = Levels(net, widths, halves(widths))
    assert torch.equal(step(lambda x: levels.run(1, x), x), step(twin, x))
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["convnet", "resnet20", "densenet", "mobilenet_v2", "layer_norm_over_maps"])
def test_training_updates_only_the_levels_own_statistics(name: str) -> None:
    net, x, widths = built(name)
    levels = nested(net.train(), widths, halves(widths, 0.3, 0.7))

    def states() -> list[dict[str, Tensor]]:
        found = [{n: t.clone() for n, t in its.state_dict().items()} for its in levels.norms]
        return [*found, {n: t.clone() for n, t in net.state_dict().items()}]

    for k in range(len(levels)):
        before, own = states(), extracted(levels, k)
        levels.run(k, x)
        own(x)
        after = states()
        for j, (then, now) in enumerate(zip(before, after, strict=True)):
            moved = {n for n in then if not torch.equal(then[n], now[n])}
            statistics = {n for n in then if "running" in n or "num_batches" in n}
            assert moved == (statistics if j == k else set()), (k, j)
        for path, norm in norms(own).items():
            for tensor, value in norm.state_dict().items():
                at = f"{path}.{tensor}" if k == len(levels) - 1 else f"{path.replace('.', '/')}.{tensor}"
                close(after[k][at].float(), value.float())


class OwnNorm(nn.Module):
    """Normalise by statistics that are written in place, or assigned."""

    def __init__(self, channels: int, assigns: bool) -> None:
        super().__init__()
        self.assigns, self.gain = assigns, nn.Parameter(torch.rand(channels) + 0.5)
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.training:
            mean = x_BCHW.detach().mean((0, 2, 3))
            if self.assigns:
                self.mean = 0.9 * self.mean + 0.1 * mean
            else:
                self.mean.mul_(0.9).add_(mean, alpha=0.1)
        return (x_BCHW - self.mean[:, None, None]) * self.gain[:, None, None]


@pytest.mark.parametrize("assigns", [False, True])
def test_norms_of_ones_own_have_statistics_for_each_level(assigns: bool) -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(conv(3, 6, 3), OwnNorm(6, assigns), nn.ReLU(), conv(6, 4, 3)),
        torch.randn(4, 3, 6, 6),
    )
    widths = discover(net, x)
    assert widths.sizes() == {"0": 6}
    levels = nested(net.train(), widths, [{"0": 4}])
    alone = extract_level(levels[0]).train()
    before = net[1].mean.clone()
    for _ in range(3):
        levels.run(0, x)
        alone(x)
    assert torch.equal(net[1].mean, before)
    close(levels[0].get_submodule("1").mean, alone.get_submodule("1").mean)
    assert [*levels.norms[0]] == ["1"]


def test_a_level_follows_the_networks_mode() -> None:
    net, x, widths = built("alexnet")
    levels = Levels(net, widths, halves(widths))
    net.eval()
    assert torch.equal(levels.run(0, x), levels.run(0, x))
    net.train()
    torch.manual_seed(0)
    assert not torch.equal(levels.run(0, x), levels.run(0, x)), "dropout"


# --- running ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnet", "densenet", "mobilenet_v2", "convnext"])
def test_threads_may_run_different_levels_at_once(name: str) -> None:
    net, _, widths = built(name)
    levels = evaluated(nested(net, widths, halves(widths, 0.25, 0.5, 0.75)))
    work = [(k, example(name, seed)) for seed in range(12) for k in range(len(levels))]
    with torch.inference_mode(), ThreadPoolExecutor(4, "level", torch.set_num_threads, (1,)) as pool:
        expected = [levels[k](x) for k, x in work]
        for got, its in zip(pool.map(lambda given: levels[given[0]](given[1]), work), expected, strict=True):
            assert torch.equal(got, its)


def test_running_in_evaluation_mode_writes_nothing() -> None:
    net, x, widths = built("densenet")
    levels = evaluated(nested(net, widths, halves(widths, 0.5)))
    held = [t for level in levels for t in (*level.parameters(), *level.buffers())]
    before = [t.detach().clone() for t in held]
    versions = [t._version for t in held]
    for level in levels:
        level(x)
    assert versions == [t._version for t in held]
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))


@every_net
def test_channels_last(name: str) -> None:
    net, x, widths = built(name)
    net.to(memory_format=torch.channels_last)
    levels = evaluated(nested(net, widths, halves(widths, 0.4)))
    inside(levels)
    x = x.contiguous(memory_format=torch.channels_last)
    close(levels[0](x), extracted(levels, 0)(x))
    close(levels.run(0, x), extracted(levels, 0)(x))


def complex_filter(m: Any, x: Tensor) -> Tensor:
    """Multiply a map's spectrum by weights of four dimensions, which are no images."""
    filtered = torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(m.weights), s=x.shape[2:])
    return m.head(m.last(m.first(filtered)))


class Split(nn.Module):
    """Asks a part of its input how many channels it has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = conv(3, 8, 3), conv(8, 8, 3), head(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.first(x).relu())
        parts = y.chunk(2, 1)
        return self.head(sum(part for part in parts))  # type: ignore[no-any-return]


ODD: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "volumes": (
        nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 4, 3), nn.Flatten(2)),
        (9, 2, 5, 6, 7),
    ),
    "complex weights": (
        Net(
            complex_filter,
            **{"weights": nn.Parameter(torch.randn(3, 8, 5, 2)), "first": conv(3, 8, 3), "last": conv(8, 4)},
            head=head(4),
        ),
        (9, 3, 8, 8),
    ),
    "shapes asked for": (Split(), (9, 3, 8, 8)),
}


@pytest.mark.parametrize("name", ODD)
def test_levels_of_networks_that_are_not_like_others_run_alone(name: str) -> None:
    net, shape = ODD[name]
    net, x = randomised(copy.deepcopy(net)).eval(), torch.randn(shape)
    widths = discover(net, x)
    for level in evaluated(nested(net, widths, halves(widths))):
        close(make_alone(level, x[:8])(x[:8]), level(x[:8]))


class Odd(nn.Module):
    """Answer with what is no row for each input."""

    def __init__(self, answer: Callable[[Tensor, nn.Conv2d], Any]) -> None:
        super().__init__()
        self.first, self.norm, self.last = conv(3, 6, 3), nn.BatchNorm2d(6), conv(6, 4, 3)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.last(self.norm(self.first(x))).mean((2, 3)), self.last)


MIXING: dict[str, Callable[[], nn.Module]] = {
    "statistics of the batch": lambda: nn.Sequential(
        *(conv(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(), conv(6, 4, 3))
    ),
    "the mean of the batch": lambda: Odd(lambda y, _: y - y.mean(0)),
    "a weight and a number": lambda: Odd(lambda y, last: (y, last.bias, 3)),
    "one number for all": lambda: Odd(lambda y, _: [y, y.sum()]),
}


@pytest.mark.parametrize("name", MIXING)
def test_alone_a_batch_is_split_only_where_each_input_is_answered_by_itself(name: str) -> None:
    torch.manual_seed(0)
    net, x = randomised(MIXING[name]()).eval(), torch.randn(19, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(make_alone(net, x[:2])(x), net(x), atol=1e-4, rtol=1e-4)


@some_nets
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_level_may_leave_as_a_network_of_its_own(name: str, memory_format: torch.memory_format) -> None:
    """It shares nothing, lies in memory as the network does, and says the same whatever becomes of it."""
    net, x, widths = built(name)
    net.to(memory_format=memory_format)
    levels = evaluated(nested(net, widths, halves(widths, 0.4, 0.8)))
    x = x.contiguous(memory_format=memory_format)
    expected = [level(x) for level in levels]
    own = [extract_level(level) for level in levels]
    held = [{t.untyped_storage().data_ptr() for t in (*n.parameters(), *n.buffers())} for n in (net, *own)]
    assert sum(map(len, held)) == len(set().union(*held))
    for level, twin in zip(levels, own, strict=True):
        assert repr(level) == repr(twin)
        for a, b in zip(level.state_dict().values(), twin.state_dict().values(), strict=True):
            assert torch.equal(a, b)
            assert b.dim() != 4 or b.is_contiguous(memory_format=memory_format)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    for twin, says in zip(own, expected, strict=True):
        close(twin(x), says)


@pytest.mark.sampled(4)
@every_net
def test_alone_it_says_the_same(name: str) -> None:
    """However it is executed then, and whatever becomes of the network."""
    net, x, widths = built(name)
    levels = evaluated(nested(net, widths, halves(widths, 0.5)))
    expected = [level(x) for level in levels]
    own = [make_alone(level, x) for level in levels]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    for twin, says in zip(own, expected, strict=True):
        close(twin(x), says)


def test_alone_in_half_precision_it_is_a_copy() -> None:
    net, x, widths = built("convnet")
    level = evaluated(nested(net.bfloat16(), widths, halves(widths, 0.5)))[0]
    assert torch.equal(make_alone(level, x.bfloat16())(x.bfloat16()), level(x.bfloat16()))


# --- storage that moves ----------------------------------------------------------------------------------


@pytest.mark.sampled(6)
@some_nets
@pytest.mark.parametrize("move", ["reindex", "double", "channels_last", "load"])
def test_share_finds_the_storage_again(name: str, move: str) -> None:
    net, x, widths = built(name)
    levels = evaluated(nested(net, widths, halves(widths, 0.4, 0.8)))
    before = [level(x).detach() for level in levels]
    if move == "reindex":
        reindex(net, widths, {n: range(w.size) for n, w in widths.items()})
    elif move == "double":
        net.double()
        levels.norms.double()
        x = x.double()
    elif move == "channels_last":
        net.to(memory_format=torch.channels_last)
    else:
        net.load_state_dict({n: t.clone() for n, t in net.state_dict().items()}, assign=True)
    levels.refresh()
    inside(levels)
    for level, expected in zip(levels, before, strict=True):
        close(level(x).float(), expected)
        close(levels.run(levels.index(level), x).float(), expected)
    with torch.no_grad():
        for _, tensor in shared(net):
            tensor.mul_(1.5)
    for k, level in enumerate(levels):
        close(level(x), extracted(levels, k)(x))


@some_nets
def test_levels_of_a_copy_are_parts_of_its_own_network(name: str) -> None:
    net, x, widths = built(name)
    levels = evaluated(nested(net, widths, halves(widths, 0.4, 0.8)))
    before = [level(x) for level in levels]
    again = copy.deepcopy(levels)
    inside(again)
    assert not {t.data_ptr() for _, t in shared(again.net)} & {t.data_ptr() for _, t in shared(net)}
    for level, expected in zip(again, before, strict=True):
        close(level(x), expected)
    with torch.no_grad():
        for _, tensor in shared(again.net):
            tensor.mul_(1.5)
    for k, level in enumerate(again):
        close(level(x), extracted(again, k)(x))
        close(levels[k](x), before[k])


# --- order -----------------------------------------------------------------------------------------------


def permutation(drawn: torch.Generator, *ends: int) -> Tensor:
    """Each stretch of channels, up to the next end, in an order of its own."""
    stretches = zip((0, *ends), ends, strict=False)
    return torch.cat([a + torch.randperm(b - a, generator=drawn) for a, b in stretches])


def closed(index: dict[str, Tensor], sizes: dict[str, int]) -> bool:
    return all(set(i[: sizes[n]].tolist()) == set(range(sizes[n])) for n, i in index.items())


def check_order(net: nn.Module, x: Tensor, widths: Widths, sizes: list[dict[str, int]], seed: int) -> None:
    """Permute within every level, or within one only: what the permutation is closed on says the same."""
    levels = evaluated(nested(net, widths, sizes))
    drawn = torch.Generator().manual_seed(seed)
    for top in range(len(levels)):
        ends = [levels.sizes[top], levels.sizes[-1]]
        index = {n: permutation(drawn, *(e[n] for e in ends)) for n in widths}
        before = [level(x).detach() for level in levels]
        held = [{n: t.clone() for n, t in its.state_dict().items()} for its in levels.norms]
        reindex(net, widths, index)
        levels.permute(index)
        inside(levels)
        kept = [k for k in range(len(levels)) if closed(index, levels.sizes[k])]
        assert {top, len(levels) - 1} <= set(kept)
        for k in kept:
            close(levels[k](x), before[k])
        for k in set(range(len(levels) - 1)) - set(kept):
            if not any(closed({n: i}, levels.sizes[k]) for n, i in index.items()):
                now = levels.norms[k].state_dict()
                assert all(torch.equal(now[n], t) for n, t in held[k].items()), "left for `inherit`"


@pytest.mark.sampled(10)
@case_with_levels
@given(data=st.data())
@settings(max_examples=2)
def test_order_keeps_the_network_and_every_level_it_is_closed_on(case: Case, data: st.DataObject) -> None:
    net, x = case.model(), case.example()
    widths = discover(net, x)
    if find_nestable(widths):
        check_order(net, x, widths, data.draw(ascending(widths)), data.draw(st.integers(0, 99)))


@pytest.mark.sampled(4)
@every_net
def test_order_is_so_in_networks_of_many_kinds(name: str) -> None:
    net, x, widths = built(name)
    check_order(net, x, widths, halves(widths, 0.3, 0.6), seed=3)


@every_net
def test_norms_are_inherited_from_the_next_level(name: str) -> None:
    """Their first channels, to the last bit; nothing else changes."""
    net, _, widths = built(name)
    levels = nested(net, widths, halves(widths, 0.3, 0.7))
    for k in (1, 0):
        others = [copy.deepcopy(its.state_dict()) for j, its in enumerate(levels.norms) if j != k]
        above = copy.deepcopy(levels[k + 1].state_dict())
        numbers, larger = entries(levels, k), entries(levels, k + 1)
        levels.copy_norms(k)
        for path, norm in norms(levels[k]).items():
            for tensor, value in norm.state_dict().items():
                key = f"{path}.{tensor}"
                is_kept = torch.isin(larger[key], numbers[key])
                assert torch.equal(value, above[key][is_kept].view(value.shape)), path
        assert all(torch.equal(above[n], t) for n, t in levels[k + 1].state_dict().items())
        left = [its.state_dict() for j, its in enumerate(levels.norms) if j != k]
        assert all(torch.equal(a[n], b[n]) for a, b in zip(others, left, strict=True) for n in a)


# --- widths that lie between others ------------------------------------------------------------------------


@pytest.mark.parametrize("case", STORED.values(), ids=STORED)
def test_a_part_is_a_view_where_all_that_is_left_lies_in_front(case: Case) -> None:
    """Against dropping a width's last channels, one number after another, from a list of positions."""
    widths = discover(case.model(), case.example())
    for name, width in widths.items():
        for size in range(1, width.size):
            parts = cut_tensors(widths, widths.sizes() | {name: size})
            for slot in (slot for slot in width.slots if is_stored(slot.tensor)):
                own, total = widths.positions(slot, name), sum(widths.extents(slot))
                left = sorted(set(range(total)) - set(own[size:].flatten().tolist()))
                kept = parts[slot.module, slot.tensor][slot.dim]
                assert torch.arange(total)[kept].tolist() == left
                assert isinstance(kept, slice) == (left == list(range(len(left))))


def test_parts_that_are_no_views_are_taken_anew_with_the_level() -> None:
    net, x = CASES["dense"].model().eval(), CASES["dense"].example()
    levels = Levels(net, discover(net, x), [{"stem": 2, "one": 1}])
    held = levels[0]
    with torch.no_grad():
        net.get_parameter("two.weight").mul_(2)
    expected = extracted(levels, 0)(x)
    assert not torch.allclose(held(x), expected)
    assert levels[0] is held
    close(held(x), expected)


# --- refusals --------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[dict[str, int]], str]] = {
    "from large to small": ([{"0": 5}, {"0": 3}], "level 0 has 5 channels of '0', level 1 has 3"),
    "larger than the network": ([{"0": 7}], "level 0 has 7 channels of '0', level 1 has 6"),
    "one up, one down": ([{"0": 3, "3": 4}, {"0": 4, "3": 3}], "from small to large"),
    "equal": ([{"0": 3}, {"0": 3}], "levels 0 and 1 are the same"),
    "the network itself": ([{"0": 6}], "levels 0 and 1 are the same"),
    "nothing cut": ([{}], "levels 0 and 1 are the same"),
    "no channel": ([{"0": 0}], "level 0 leaves width '0' without a channel"),
    "less than none": ([{"0": -2}], "level 0 leaves width '0' without a channel"),
    "an unknown width": ([{"nonsense": 2}], "'nonsense'"),
    "a fixed width": ([{"16": 2}], "width '16' cannot change: it is the model's output"),
}


@pytest.mark.parametrize("what", WRONG)
def test_sizes_that_cannot_be_are_refused(what: str) -> None:
    net, _, widths = built("convnet")
    sizes, named = WRONG[what]
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(StructureError) as caught:
        Levels(net, widths, sizes)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_weights_that_are_computed_stay_whole_in_every_level(kind: str) -> None:
    torch.manual_seed(0)
    normed = getattr(nn.utils.parametrizations, kind)(conv(4, 6, 3))
    net = nn.Sequential(
        conv(3, 4, 3), normed, nn.ReLU(), conv(6, 8, 3), nn.ReLU(), conv(8, 6), head(6)
    ).eval()
    x = torch.randn(4, 3, 8, 8)
    widths = discover(net, x)
    assert find_nestable(widths) == ["3", "5"]
    levels = Levels(net, widths, [{"3": 5, "5": 3}])
    step(lambda x: levels.run(0, x), x)
    with torch.no_grad():
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.1 * parameter.grad)
    smaller = copy.deepcopy(net)
    reindex(smaller, discover(smaller, x), {"3": range(5), "5": range(3)})
    close(levels[0](x), smaller(x))
    close(make_alone(levels[0], x)(x), smaller(x))


@pytest.mark.parametrize("grain", ["weight", "channel"])
def test_a_gated_network_is_refused(grain: Any) -> None:
    net, x, widths = built("convnet")
    gates.attach_gates(net, widths, grain)
    with pytest.raises(StructureError, match="a gated network has no levels") as caught:
        Levels(net, widths, halves(widths))
    assert "\n" not in str(caught.value)
    folded = fold_gates(net)
    assert len(Levels(folded, discover(folded, x), halves(widths))) == 2
