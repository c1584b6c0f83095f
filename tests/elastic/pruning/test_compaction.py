"""Compaction against the gated network itself, on random networks with random gates and statistics."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from elastic.errors import StructureError
from elastic.measure.counts import count_macs, count_params
from elastic.models import convnet, resnet20
from elastic.pruning import compaction, gates
from elastic.pruning.compaction import TINY, compact
from elastic.pruning.constants import keeps_constants, observe_constants
from elastic.pruning.dead import find_removable_channels
from elastic.pruning.gates import Grain
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover
from elastic.widths.parameters import get_original, get_weight
from tests.elastic.pruning.grains import every_case_and_grain
from tests.elastic.zoo import CASES, Case, Net, conv, differences, head, states

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Identity)
slow_to_draw = settings(suppress_health_check=[HealthCheck.too_slow])


# --- random networks ----------------------------------------------------------------------------------


class Draw:
    """Small decisions, and a network's blocks made of them."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def of(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def conv(self, read: int, written: int, **options: Any) -> nn.Conv2d:
        kernel, stride, mode = self.of((3, 1, "zeros"), (1, 1, "zeros"), (3, 2, "zeros"), (3, 1, "reflect"))
        padding = options.pop("padding", self.of(kernel // 2, 0) if stride == 1 else kernel // 2)
        return nn.Conv2d(
            read, written, kernel, options.pop("stride", stride), padding, bias=self.of(False, True),
            padding_mode=mode if padding else "zeros", **options,
        )  # fmt: skip

    def same_size(self, read: int, written: int, **options: Any) -> nn.Conv2d:
        return conv(read, written, self.of(1, 3), bias=self.of(False, True), **options)

    def norm(self, channels: int) -> nn.Module:
        return self.of(nn.BatchNorm2d, nn.BatchNorm2d, lambda _: nn.Identity())(channels)

    def activation(self) -> nn.Module:
        return self.of(*ACTIVATIONS)()

    def block(self, read: int) -> tuple[nn.Module, int]:
        kinds = (
            self.plain, self.residual, self.projection, self.preactivation, self.depthwise, self.grouped,
            self.squeeze_excite, self.concatenation, self.group_norm, self.pooling,
        )  # fmt: skip
        return self.of(*kinds)(read)

    def plain(self, read: int) -> tuple[nn.Module, int]:
        written = self.of(2, 3, 4)
        return nn.Sequential(self.conv(read, written), self.norm(written), self.activation()), written

    def residual(self, read: int) -> tuple[nn.Module, int]:
        between = self.of(2, 3)
        body = nn.Sequential(
            *(self.same_size(read, between), self.norm(between), self.activation()),
            *(self.same_size(between, read), self.norm(read)),
        )
        return Net(lambda m, x: m.act(x + m.body(x)), body=body, act=self.activation()), read

    def projection(self, read: int) -> tuple[nn.Module, int]:
        written, kinds = self.of(2, 4), dict(stride=self.of(1, 2))
        layers = dict(
            body=nn.Sequential(conv(read, written, 3, **kinds), self.norm(written)),
            short=nn.Sequential(conv(read, written, 1, **kinds), self.norm(written)),
        )
        return Net(lambda m, x: m.act(m.short(x) + m.body(x)), act=self.activation(), **layers), written

    def preactivation(self, read: int) -> tuple[nn.Module, int]:
        """Two readers of one width, each behind a norm of its own."""
        layers = dict(
            one=nn.Sequential(nn.BatchNorm2d(read), nn.ReLU(), self.same_size(read, 3)),
            two=nn.Sequential(nn.BatchNorm2d(read), self.activation(), self.same_size(read, 3)),
        )
        return Net(lambda m, x: m.one(x) + m.two(x), **layers), 3

    def depthwise(self, read: int) -> tuple[nn.Module, int]:
        times, written = self.of(1, 2), self.of(2, 3)
        return nn.Sequential(
            *(self.same_size(read, read * times, groups=read), self.norm(read * times), self.activation()),
            self.same_size(read * times, written),
        ), written

    def grouped(self, read: int) -> tuple[nn.Module, int]:
        return nn.Sequential(
            *(self.same_size(read, 4), self.activation()),
            *(self.same_size(4, 4, groups=2), self.norm(4), self.activation()),
        ), 4

    def squeeze_excite(self, read: int) -> tuple[nn.Module, int]:
        excite = nn.Sequential(
            *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(read, 2, 1), nn.ReLU(), nn.Conv2d(2, read, 1)),
            self.of(nn.Sigmoid, nn.Hardsigmoid)(),
        )
        return Net(lambda m, x: x * m.excite(x), excite=excite), read

    def concatenation(self, read: int) -> tuple[nn.Module, int]:
        between = self.of(2, 3)
        new = nn.Sequential(self.same_size(read, between), self.norm(between), self.activation())
        return Net(lambda m, x: torch.cat([x, m.new(x)], 1), new=new), read + between

    def group_norm(self, read: int) -> tuple[nn.Module, int]:
        return nn.Sequential(self.same_size(read, 4), nn.GroupNorm(self.of(1, 2, 4), 4), self.activation()), 4

    def pooling(self, read: int) -> tuple[nn.Module, int]:
        return self.of(
            lambda: nn.AvgPool2d(3, 1, 1), lambda: nn.MaxPool2d(3, 1, 1), lambda: nn.Dropout(0.5)
        )(), read

    def head(self, read: int) -> nn.Module:
        kind = self.of("average", "flatten", "alexnet", "convolution")
        if kind == "average":
            return head(read)
        if kind == "convolution":
            return nn.Sequential(nn.Conv2d(read, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        flat = (nn.AdaptiveAvgPool2d(2), nn.Flatten())
        if kind == "flatten":
            return nn.Sequential(*flat, nn.Linear(4 * read, 5))
        hidden = (
            nn.Linear(4 * read, 6),
            nn.ReLU(),
            nn.Linear(6, 4, bias=False),
            nn.BatchNorm1d(4),
            nn.ReLU(),
        )
        return nn.Sequential(nn.Dropout(0.5), *flat, *hidden, nn.Dropout(0.5), nn.Linear(4, 5))


@st.composite
def networks(draw: Any) -> nn.Module:
    """A gated network of random blocks, statistics and gates; whole filters and columns are shut."""
    made = Draw(draw)
    torch.manual_seed(draw(st.integers(0, 10_000)))
    read = made.of(2, 4)
    layers: list[nn.Module] = [made.conv(3, read), made.norm(read), made.activation()]
    for _ in range(draw(st.integers(0, 3))):
        block, read = made.block(read)
        layers.append(block)
    net = nn.Sequential(*layers, made.head(read))
    shaken(net)
    grain = made.of("weight", "kernel", "channel", None)
    try:
        widths = discover(net, X)
    except StructureError:
        assume(False)
    if grain is not None:
        gates.attach_gates(net, widths, grain)
    shut(net, made.of(0.0, 0.3, 0.6, 1.0))
    return net.train(draw(st.booleans()))


def shaken(net: nn.Module) -> None:
    """Random norms and biases; a third of the shifts is zero, so that some dead channels are silent."""
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.dim() == 1 and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() == 1:
                tensor.normal_().mul_(torch.rand_like(tensor) > 1 / 3)


def shut(net: nn.Module, rate: float) -> None:
    """Close gates (or zero weights, where there are none): single ones, whole rows and whole columns."""
    gated = {id(layer): gate for _, layer, gate in gates.iterate_gates(net)}
    with torch.no_grad():
        for layer in net.modules():
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                continue
            gate = gated.get(id(layer))
            held = get_original(layer, "weight") if gate is None else gate.score
            assert held is not None
            closed = torch.zeros_like(held, dtype=torch.bool) if gate is None else torch.rand_like(held) < 0.3
            closed[torch.rand(len(held)) < rate] = True
            closed[:, torch.rand(held.shape[1]) < rate / 2] = True
            held.masked_fill_(closed, 0.0 if gate is None else -1.0)


def close(actual: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


@torch.no_grad()
def evaluated(net: nn.Module, x: Tensor = X) -> Tensor:
    return copy.deepcopy(net).eval()(x)  # type: ignore[no-any-return]


# --- properties -----------------------------------------------------------------------------------------


def check_function(net: nn.Module, small: nn.Module) -> None:
    close(evaluated(small), evaluated(net))
    close(evaluated(small, 3 * X + 1), evaluated(net, 3 * X + 1))


def check_size(net: nn.Module, small: nn.Module) -> None:
    assert not any(module._forward_pre_hooks for module in (*net.modules(), *small.modules()))
    assert not any(parametrize.is_parametrized(module) for module in small.modules())
    assert not any(module.training for module in small.modules())
    assert count_params(small) <= count_params(net)
    assert count_macs(small, X) <= count_macs(net, X)
    for parameter in small.parameters():
        assert not ((parameter != 0) & (parameter.abs() < TINY)).any()


def check_rest(small: nn.Module) -> None:
    again = compact(small, X)
    assert repr(again) == repr(small)
    for (name, tensor), before in zip(again.state_dict().items(), small.state_dict().values(), strict=True):
        assert torch.equal(tensor, before), name


def check_training(small: nn.Module) -> None:
    optimizer = torch.optim.Adam(small.train().parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(small(X), torch.arange(4)).backward()
        optimizer.step()
    assert all(p.requires_grad and p.is_leaf for p in small.parameters())
    assert torch.isfinite(evaluated(small)).all()


def check_removal(net: nn.Module) -> None:
    widths = discover(net, X)
    before, drawn, first = states(net), torch.get_rng_state(), widths.sizes()
    keep = find_removable_channels(net, widths, X)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not differences(before, states(net))
    assert not any(module._forward_pre_hooks for module in net.modules())
    for name, index in keep.items():
        assert 0 < len(index) < first[name]
        assert index.tolist() == sorted(set(index.tolist()))
    expected = evaluated(net)
    reindex(net, widths, keep)
    close(evaluated(net), expected)


@given(net=networks())
@settings(slow_to_draw, max_examples=20)
def test_a_compacted_network_computes_the_same_and_is_never_larger(net: nn.Module) -> None:
    before, drawn = states(net), torch.get_rng_state()
    small = compact(net, X)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not differences(before, states(net))
    check_function(net, small)
    check_size(net, small)


@given(net=networks())
@settings(slow_to_draw, max_examples=8)
def test_compacting_twice_changes_nothing_more_and_the_network_trains(net: nn.Module) -> None:
    small = compact(net, X)
    check_rest(small)
    check_training(small)


@given(net=networks())
@settings(slow_to_draw, max_examples=15)
def test_dropping_what_is_silent_changes_nothing(net: nn.Module) -> None:
    check_removal(net)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(net=networks())
@settings(slow_to_draw, max_examples=400)
def test_all_of_it_holds_for_many_networks(net: nn.Module) -> None:
    small = compact(net, X)
    check_function(net, small)
    check_size(net, small)
    check_rest(small)
    check_training(small)
    check_removal(net)


@pytest.mark.sampled(10)
@every_case_and_grain
def test_every_structure_that_can_be_followed_can_be_compacted(case: Case, grain: Grain) -> None:
    x = case.example()
    net = case.model()
    shaken(net)
    widths = discover(net, x)
    gates.attach_gates(net, widths, grain)
    shut(net, 0.6)
    expected = evaluated(net, x)
    close(evaluated(compact(net, x), x), expected)
    reindex(net, widths, find_removable_channels(net, widths, x))
    close(evaluated(net, x), expected)


# --- by hand ---------------------------------------------------------------------------------------------


def two_convs(kernel: int = 1, norm: bool = False, written: int = 4) -> Any:
    """Width "0" is read by "2", whose width "2" (5 channels) the logits read."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(conv(3, written), nn.ReLU(), conv(written, 5, kernel, bias=not norm)),
        *(nn.BatchNorm2d(5) if norm else nn.Identity(), nn.ReLU(), head(5)),
    ).eval()


def dead(net: Any, channels: list[int], constant: float) -> None:
    with torch.no_grad():
        net[0].weight[channels] = 0
        net[0].bias[channels] = constant


def sizes(net: nn.Module) -> dict[str, int]:
    return discover(net, X).sizes()


def test_unread_channels_leave() -> None:
    net = two_convs()
    with torch.no_grad():
        net[2].weight[:, [0, 3]] = 0
    small = compact(net, X)
    assert sizes(small) == {"0": 2, "2": 5}
    close(small(X), net(X))


@pytest.mark.parametrize("norm", [True, False], ids=["into the norm", "into the bias"])
@pytest.mark.parametrize("constant", [0.0, 2.0, -2.0])
def test_unwritten_channels_leave_and_their_constant_stays(norm: bool, constant: float) -> None:
    net = two_convs(norm=norm)
    dead(net, [1, 2], constant)
    small: Any = compact(net, X)
    assert sizes(small) == {"0": 2, "2": 5}
    assert (small[2].bias is None) == norm
    close(small(X), net(X))


def test_behind_padding_one_channel_carries_all_constants() -> None:
    net = two_convs(kernel=3)
    dead(net, [0, 1, 3], 1.5)
    net[0].bias.data[0] = 0.5
    small = compact(net, X)
    assert sizes(small) == {"0": 2, "2": 5}
    close(small(X), net(X))


def test_behind_padding_a_silent_channel_leaves_all_the_same() -> None:
    net = two_convs(kernel=3)
    dead(net, [0, 1], -1.0)
    small = compact(net, X)
    assert sizes(small) == {"0": 2, "2": 5}
    close(small(X), net(X))


@pytest.mark.parametrize("constant", [0.0, 2.0])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("written", [1, 4])
def test_a_width_that_is_dead_as_a_whole_keeps_one_channel(
    constant: float, kernel: int, norm: bool, written: int
) -> None:
    net = two_convs(kernel, norm, written)
    dead(net, list(range(written)), constant)
    small = compact(net, X)
    assert sizes(small)["0"] == 1
    close(small(X), net(X))
    again = compact(small, X)
    close(again(X), net(X))


def test_nothing_is_left_but_a_constant() -> None:
    net = convnet((4, 6, 6, 8), in_channels=3)
    gates.attach_gates(net, discover(net, X), "weight")
    shaken(net)
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data.fill_(-1)
    small = compact(net, X)
    assert set(sizes(small).values()) == {1}
    close(evaluated(small), evaluated(net))


def test_a_death_spreads_up_and_down() -> None:
    """What only dead channels read, or write, dies with them."""
    net: Any = convnet((4, 6, 6, 8), in_channels=3)
    with torch.no_grad():
        net[7].weight[:, :5] = 0  # five of the second convolution's six are unread
        net[3].weight[:5].normal_()
        net[3].weight[5, 1:] = 0  # the sixth reads one of four
    small = compact(net, X)
    assert list(sizes(small).values()) == [1, 1, 6, 8]
    close(evaluated(small), evaluated(net))


def test_a_shortcut_writes_its_width_too() -> None:
    """A channel is dead where no writer of a residual width is left, and only there."""
    case = CASES["projection"]
    net: Any = case.model().eval()
    x = case.example()
    with torch.no_grad():
        net.two.weight[[0, 1]] = 0
        net.short.weight[[1, 2]] = 0
    small = compact(net, x)
    assert discover(small, x).sizes()["short"] == 4
    close(small(x), net(x))


@pytest.mark.parametrize("kind", ["group_norm_of_groups", "layer_norm"])
def test_channels_normalised_together_stay(kind: str) -> None:
    case = CASES[kind]
    net, x = case.model(), case.example()
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        first.weight[0] = 0
        first.bias[0] = 0  # type: ignore[index]
    small = compact(net, x)
    assert discover(small, x).sizes() == case.sizes
    close(evaluated(small, x), evaluated(net, x))


def test_a_group_of_zeros_goes_from_a_group_norm() -> None:
    net, x = CASES["group_norm"].model().eval(), CASES["group_norm"].example()
    with torch.no_grad():
        net[0].weight[:3] = 0
        net[0].bias[:3] = 0
    small = compact(net, x)
    assert [small[1].num_groups, small[1].num_channels] == [1, 3]
    close(small(x), net(x))


def test_denormals_are_flushed() -> None:
    net = two_convs()
    with torch.no_grad():
        net[2].weight[0] = 1e-40
        net[0].weight[1] = -1e-41
        net[0].bias[1] = 0
    small: Any = compact(net, X)
    assert sizes(small) == {"0": 3, "2": 4}
    for parameter in small.parameters():
        assert not ((parameter != 0) & (parameter.abs() < TINY)).any()
    close(small(X), net(X))


def test_other_types_than_float32() -> None:
    net, x = two_convs().double(), X.double()
    dead(net, [1], 2.0)
    small = compact(net, x)
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    torch.testing.assert_close(small(x), net(x))


def test_a_constant_is_not_judged_by_the_noise_alone() -> None:
    """The map saturates at 1 on inputs of size 1; on larger ones it does not, and channel 1 varies."""
    torch.manual_seed(0)
    net: Any = Net(
        lambda m, x: m.head(m.last((y := m.conv(x)) * F.hardsigmoid(m.map(y)))),
        **dict(conv=conv(3, 4), map=conv(4, 1), last=conv(4, 5), head=head(5)),
    ).eval()
    with torch.no_grad():
        net.conv.weight[1], net.conv.bias[1] = 0, 1
        net.map.bias.fill_(8)
    small = compact(net, X)
    close(small(30 * X), net(30 * X))


def test_resnet20_shrinks_and_stays_equal() -> None:
    torch.manual_seed(0)
    net = resnet20(width=8)
    x = torch.randn(2, 3, 16, 16)
    shaken(net)
    widths = discover(net, x)
    gates.attach_gates(net, widths, "weight")
    shut(net, 0.4)
    small = compact(net, x)
    after = discover(small, x).sizes()
    assert all(after[name] <= size for name, size in widths.sizes().items())
    assert sum(after.values()) < 0.8 * sum(widths.sizes().values())
    close(evaluated(small, x), evaluated(net, x))


# --- silent -----------------------------------------------------------------------------------------------


def test_only_gates_silence() -> None:
    """Zeros that no gate made may yet be trained: fresh channels are read by zeros."""
    net = two_convs()
    with torch.no_grad():
        net[2].weight[:, 0] = 0
        net[0].weight[1] = 0
        net[0].bias[1] = 0
    widths = discover(net, X)
    assert find_removable_channels(net, widths, X) == {}
    gates.attach_gates(net, widths, "weight")
    assert find_removable_channels(net, widths, X) == {}
    for path, _, gate in gates.iterate_gates(net):
        if path == "2":
            gate.score.data[:, 0] = -1
    assert {n: i.tolist() for n, i in find_removable_channels(net, widths, X).items()} == {"0": [1, 2, 3]}


@pytest.mark.parametrize(("constant", "kept"), [(-1.0, [0, 2, 3]), (1.0, None)])
def test_a_channel_with_a_constant_is_not_silent(constant: float, kept: list[int] | None) -> None:
    net = two_convs()
    widths = discover(net, X)
    gates.attach_gates(net, widths, "kernel")
    gate = next(gate for path, _, gate in gates.iterate_gates(net) if path == "0")
    gate.score.data[1] = -1
    net[0].bias.data[1] = constant
    found = find_removable_channels(net, widths, X)
    assert found == {} if kept is None else found["0"].tolist() == kept


def test_a_channel_is_silent_in_training_too() -> None:
    """A norm whose running mean lags hides in evaluation mode what its shift shows in training mode."""
    net: Any = nn.Sequential(conv(3, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), head(4))
    widths = discover(net, X)
    gates.attach_gates(net, widths, "weight")
    gate = next(gate for path, _, gate in gates.iterate_gates(net) if path == "0")
    gate.score.data[1] = -1
    net[1].bias.data[1] = 0.5
    net[1].running_mean[1] = 3.0
    with torch.no_grad():
        expected = copy.deepcopy(net)(X)
        reindex(net, widths, find_removable_channels(net, widths, X))
        close(net(X), expected)


def test_silence_never_empties_a_width() -> None:
    net = two_convs()
    widths = discover(net, X)
    gates.attach_gates(net, widths, "weight")
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data.fill_(-1)
    keep = find_removable_channels(net, widths, X)
    assert {name: len(index) for name, index in keep.items()} == {"0": 1, "2": 1}
    expected = evaluated(net)
    reindex(net, widths, keep)
    assert find_removable_channels(net, widths, X) == {}
    close(evaluated(net), expected)


def test_looking_for_silent_channels_leaves_every_modules_mode_alone() -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), head(4))
    widths = discover(net, X)
    gates.attach_gates(net, widths, "channel")
    next(gate for _, _, gate in gates.iterate_gates(net)).score.data[1] = -1
    net[1].eval()  # a norm that its owner has frozen
    before = [module.training for module in net.modules()]
    assert find_removable_channels(net, widths, X)["0"].tolist() == [0, 2, 3]
    assert [module.training for module in net.modules()] == before


# --- odd readers -------------------------------------------------------------------------------------------


def test_readers_that_share_a_weight_keep_what_they_cannot_take_over() -> None:
    """Behind zero padding, each of them would add the constants to the one weight that both have."""
    torch.manual_seed(0)
    net: Any = Net(
        lambda m, x: m.head(m.one(y := m.stem(x).relu()) + m.two(2 * y)),
        **dict(stem=conv(3, 4), one=conv(4, 5, 3), two=conv(4, 5, 3), head=head(5)),
    ).eval()
    net.two.weight = net.one.weight
    with torch.no_grad():
        net.stem.weight[[0, 2]] = 0
        net.stem.bias[[0, 2]] = torch.tensor([1.0, 2.0])
        net.one.weight[:, 3] = 0
    small: Any = compact(net, X)
    close(small(X), net(X))
    assert small.stem.out_channels == 3 and small.two.weight is small.one.weight


class Shifted(nn.Conv2d):
    """Read something else than it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + torch.rand_like(input[:, :1]))


def test_nothing_is_known_of_what_another_forward_reads() -> None:
    layer = Shifted(3, 4, 1)
    assert not keeps_constants(layer)
    assert observe_constants(nn.Sequential(layer), ["0"], torch.zeros_like(X))["0"].isnan().all()
    layer = nn.Conv2d(3, 4, 1)
    assert keeps_constants(layer) and list(observe_constants(nn.Sequential(layer), ["0"], X)) == ["0"]
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert not keeps_constants(layer) and observe_constants(nn.Sequential(layer), ["0"], X) == {}


class ScaledConv(nn.Conv2d):
    """Pads by itself, and scales its weight."""

    edge = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 0, 1, 0), value=self.edge)
        return F.conv2d(x, self.weight * 0.5, bias=self.bias)


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_zeros_are_known_where_a_function_reads_them(edge: float) -> None:
    """Closed channels go where convolutions have forwards of their own, unless these put something in."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(ScaledConv(3, 6, 2), nn.BatchNorm2d(6), nn.ReLU(), ScaledConv(6, 8, 2), nn.ReLU()),
        *(ScaledConv(8, 5, 2), head(5)),
    ).eval()
    net[3].edge = edge
    gates.attach_gates(net, discover(net, X), "channel")
    for _, _, gate in gates.iterate_gates(net):
        gates.set_score(gate, torch.where(torch.arange(len(gate.score)) < 3, 1.0, -1.0).view_as(gate.score))
    small = compact(net, X)
    close(small(X), net(X))
    assert [small[i].weight.shape[0] for i in (0, 3, 5)] == [3 if edge == 0 else 6, 3, 3]


def read_by_an_auxiliary_head(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x).relu()
    if m.training:
        m.auxiliary = m.aux(y.mean((2, 3)) + m.shift)
    return m.head(m.last(y))


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_what_is_read_in_training_alone_goes_where_it_is_zero_there(shift: float) -> None:
    torch.manual_seed(0)
    layers = dict(stem=conv(3, 4), last=conv(4, 5), head=head(5), aux=nn.Linear(4, 2))
    net: Any = Net(read_by_an_auxiliary_head, **layers)
    net.shift = shift
    gates.attach_gates(net, discover(net, X), "channel")
    gate = next(gate for path, _, gate in gates.iterate_gates(net) if path == "stem")
    gates.set_score(gate, torch.tensor([1.0, -1.0, 1.0, -1.0]).view_as(gate.score))
    keep = find_removable_channels(net, discover(net, X), X)
    assert keep.keys() == (set() if shift else {"stem"})
    small: Any = compact(net, X)
    close(small(X), evaluated(net))
    assert small.stem.out_channels == small.aux.in_features == (4 if shift else 2)


@pytest.mark.parametrize(
    ("layer", "keeps"),
    [
        (nn.Linear(3, 4), True),
        (nn.Conv2d(3, 4, 3), True),
        (nn.Conv2d(3, 4, 3, padding="valid"), True),
        (nn.Conv2d(3, 4, 1, padding="same"), True),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), True),
        (nn.Conv2d(3, 4, 3, padding="same"), False),
        (nn.Conv2d(3, 4, 3, padding=(0, 1)), False),
        (nn.Conv1d(3, 4, 1, padding=1), False),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), False),
    ],
    ids=repr,
)
def test_which_layers_make_constant_maps_of_constant_maps(layer: nn.Module, keeps: bool) -> None:
    shape = (2, 3) if isinstance(layer, nn.Linear) else (2, 3, 9, 9)[: get_weight(layer).dim()]
    x = torch.arange(1.0, 4.0).view(1, 3, *[1] * (len(shape) - 2)).expand(shape)
    y = layer(x).detach()
    assert (
        torch.allclose(y, y.mean(tuple(range(2, y.dim())), keepdim=True) if y.dim() > 2 else y[:1]) == keeps
    )
    assert keeps_constants(layer) == keeps


def test_a_layer_called_by_keyword_is_seen() -> None:
    net: Any = Net(
        lambda m, x: m.head(m.last(input=m.stem(x).relu())), stem=conv(3, 4), last=conv(4, 5), head=head(5)
    )
    with torch.no_grad():
        net.stem.weight[1], net.stem.bias[1] = 0, 2.0
    constants = observe_constants(net.eval(), ["last"], X)["last"]
    assert constants[1] == 2.0 and constants[[0, 2, 3]].isnan().all()


def test_a_grouped_convolution_with_one_channel_left_in_a_group_is_looked_at_again() -> None:
    """It is a depthwise one then, whose channels can go one by one."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(
        *(conv(3, 4), nn.ReLU(), conv(4, 4, 3, groups=2), nn.ReLU(), conv(4, 5), nn.ReLU(), head(5))
    ).eval()
    with torch.no_grad():
        net[0].weight[[1, 3]], net[0].bias[[1, 3]] = 0, 0
        net[2].weight[[1, 3]], net[2].bias[[1, 3]] = 0, 0
        net[4].weight[:, 2] = 0
    small = compact(net, X)
    assert sizes(small) == {"0": 1, "2": 1, "4": 5}
    close(small(X), net(X))


# --- work ---------------------------------------------------------------------------------------------------


def chain(depth: int) -> nn.Sequential:
    """Each layer's first channel reads that before it alone, and has a constant: one after the other dies."""
    torch.manual_seed(0)
    layers = [conv(3, 4), *(conv(4, 4) for _ in range(depth))]
    with torch.no_grad():
        layers[0].weight[0] = 0
        for layer in layers[1:]:
            layer.weight[0, 1:] = 0
        layers[-1].weight[:, 3] = 0  # and the last channel of each dies from behind
        for layer in layers[1:-1]:
            layer.weight[:3, 3] = 0
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), head(4)).eval()


def test_the_work_is_linear_in_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where death spreads through all layers, from one to the next."""
    work: list[dict[str, int]] = []
    for depth in (8, 16, 32):
        calls = dict.fromkeys(("find_following_norms", "find_widths", "observe_constants", "find_unread"), 0)
        for name in calls:
            function = getattr(compaction, name)

            def counted(*args: Any, name: str = name, function: Any = function, calls: Any = calls) -> Any:
                calls[name] += 1
                return function(*args)

            monkeypatch.setattr(compaction, name, counted)
        net = chain(depth)
        small = compact(net, X)
        assert set(sizes(small).values()) <= {1, 2, 3} and count_params(small) < count_params(net)
        close(small(X), net(X))
        monkeypatch.undo()
        work.append(calls)
    for calls in work:
        assert (calls["find_following_norms"], calls["find_widths"], calls["observe_constants"]) == (1, 1, 1)
    looks = [calls["find_unread"] for calls in work]
    assert looks[2] - looks[1] <= 2 * (looks[1] - looks[0]) + 8, looks
