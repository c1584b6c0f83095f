"""Sizes of levels against arithmetic by hand, and against every step of 1/64 that could have been taken."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from elastic.errors import OptionError, StructureError
from elastic.levels.cutting import find_nestable
from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes, make_resized
from elastic.measure import counts
from elastic.models import convnet
from elastic.models.resnet import resnet
from elastic.widths.discovery import discover
from elastic.widths.width import Widths
from tests.elastic.zoo import CASES, conv, head, randomised

CHANNELS = (5, 8, 12, 24)
NAMES = ("0", "3", "7", "10")
X = torch.zeros(1, 3, 8, 8)
WIDTHS = discover(convnet(CHANNELS, in_channels=3, classes=5), X)


def network() -> tuple[nn.Sequential, Widths]:
    torch.manual_seed(0)
    net = convnet(CHANNELS, in_channels=3, classes=5)
    assert WIDTHS.sizes() == dict(zip(NAMES, CHANNELS, strict=True))
    return net, WIDTHS


def macs_by_hand(sizes: dict[str, int]) -> int:
    """Of `network` with these channels: 3×3 convolutions on 8×8, 8×8, 4×4 and 4×4 pixels, a linear layer."""
    channels = [sizes[name] for name in NAMES]
    pixels = (64, 64, 16, 16)
    layers = zip((3, *channels), channels, pixels, strict=False)
    return sum(9 * read * written * at for read, written, at in layers) + 5 * channels[-1]


def nestedness(found: list[dict[str, int]]) -> None:
    assert all(small[n] <= large[n] for small, large in pairwise(found) for n in small)


# --- fractions ---------------------------------------------------------------------------------------------


@given(st.integers(1, 999), st.integers(1, 16))
@settings(max_examples=40)
def test_a_fraction_is_rounded_to_the_nearest_multiple(thousandths: int, multiple: int) -> None:
    """By hand, in whole numbers: nearer than half a multiple, but at least one, or the whole width."""
    net, widths = network()
    (sizes,) = level_sizes(net, widths, X, [thousandths / 1000], multiple=multiple)
    assert list(sizes) == list(NAMES)
    for size, whole in zip(sizes.values(), CHANNELS, strict=True):
        assert 1 <= size <= whole
        if size < whole:
            assert size % multiple == 0
            assert abs(1000 * size - thousandths * whole) <= 500 * multiple or size == multiple
        else:
            assert 1000 * whole - thousandths * whole <= 500 * multiple or whole < 2 * multiple


@given(st.lists(st.integers(110, 999), min_size=1, max_size=5, unique=True), st.integers(1, 8))
@settings(max_examples=40)
def test_ascending_fractions_give_nested_sizes(thousandths: list[int], multiple: int) -> None:
    net, widths = network()
    fractions = [t / 1000 for t in sorted(thousandths)]
    nestedness([*level_sizes(net, widths, X, fractions, multiple=multiple), widths.sizes()])


def test_three_steps_of_twenty_per_cent() -> None:
    net, widths = network()
    found = level_sizes(net, widths, X, [0.512, 0.64, 0.8])
    assert [list(sizes.values()) for sizes in found] == [[3, 4, 6, 12], [3, 5, 8, 15], [4, 6, 10, 19]]
    assert len(Levels(net, widths, found)) == 4


@pytest.mark.parametrize("by", ["fraction", "macs"])
def test_widths_that_cannot_be_cut_stay_whole(by: Any) -> None:
    normed = nn.utils.parametrizations.weight_norm(conv(4, 6, 3))
    net = nn.Sequential(conv(3, 4, 3), normed, nn.ReLU(), conv(6, 8, 3), nn.ReLU(), conv(8, 6), head(6))
    x = torch.randn(4, 3, 8, 8)
    widths = discover(net, x)
    level = 0.5 if by == "fraction" else counts.count_macs(net, x) - 1
    (sizes,) = level_sizes(net, widths, x, [level], by)
    assert list(sizes) == find_nestable(widths) == ["3", "5"] and len(widths) == 4
    levels = Levels(net, widths, [sizes])
    assert all(levels.sizes[0][n] == widths[n].size for n in widths if n not in sizes)
    assert levels[0].eval()(x).shape == net.eval()(x).shape


# --- budgets -----------------------------------------------------------------------------------------------


def cut(fraction: float, multiple: int) -> dict[str, int]:
    """Rounded down to a multiple; at least one of them, or the whole width."""
    down = [int(whole * fraction / multiple + 1e-9) * multiple for whole in CHANNELS]
    return {n: min(max(d, multiple), w) for n, d, w in zip(NAMES, down, CHANNELS, strict=True)}


def largest_within(sizes: dict[str, int], budget: float, multiple: int, of: Callable[..., float]) -> None:
    assert of(sizes) <= budget
    for step in range(1, 65):
        other = cut(step / 64, multiple)
        if of(other) <= budget:
            assert all(other[n] <= sizes[n] for n in sizes), "a larger one would have been within it"


@given(st.integers(0, 1000), st.sampled_from([1, 2, 3, 4, 8]))
@example(1000, 1)
@example(1000, 4)  # the widths that are no multiple of 4 are cut, the others are whole
@settings(max_examples=10)
def test_a_budget_of_macs_is_spent_and_kept(thousandths: int, multiple: int) -> None:
    net, widths = network()
    least, most = macs_by_hand(cut(0, multiple)), macs_by_hand(widths.sizes())
    assert most == counts.count_macs(net, X)
    budget = least + (most - 1 - least) * thousandths // 1000
    (sizes,) = level_sizes(net, widths, X, [budget], "macs", multiple)
    largest_within(sizes, budget, multiple, macs_by_hand)
    level = Levels(net, widths, [sizes])[0]
    assert counts.count_macs(level, X) == macs_by_hand(sizes) <= budget
    for size, whole in zip(sizes.values(), CHANNELS, strict=True):
        assert size % multiple == 0 or size == whole


@given(st.lists(st.integers(1, 999), min_size=2, max_size=4, unique=True), st.sampled_from([1, 4]))
@settings(max_examples=5)
def test_ascending_budgets_give_nested_sizes(thousandths: list[int], multiple: int) -> None:
    net, widths = network()
    least, most = macs_by_hand(cut(0, multiple)), macs_by_hand(widths.sizes())
    budgets = [least + (most - 1 - least) * t / 1000 for t in sorted(thousandths)]
    found = level_sizes(net, widths, X, budgets, "macs", multiple)
    nestedness([*found, widths.sizes()])
    for sizes, budget in zip(found, budgets, strict=True):
        largest_within(sizes, budget, multiple, macs_by_hand)


def test_budgets_of_a_residual_network() -> None:
    """Its level's MACs, as counted on the level itself, are within; one step of 1/64 more is not."""
    net, x = resnet(1, 8, classes=5), torch.zeros(1, 3, 16, 16)
    widths = discover(net, x)
    whole = counts.count_macs(net, x)
    budgets = [0.2 * whole, 0.5 * whole]
    found = level_sizes(net, widths, x, budgets, "macs")
    levels = Levels(net, widths, found)
    for k, budget in enumerate(budgets):
        assert counts.count_macs(levels[k], x) <= budget
        fraction = min((found[k][n] + 1) / widths[n].size for n in widths) + 1 / 64
        more = {n: min(w.size, int(w.size * fraction)) for n, w in widths.items()}
        assert counts.count_macs(make_resized(net, widths, more), x) > budget


def width_of_the_first(net: nn.Module) -> int:
    return int(net[0].out_channels)  # type: ignore[index]


@pytest.mark.parametrize("multiple", [1, 3])
def test_budgets_of_latency_are_measured_on_networks_with_their_data(multiple: int) -> None:
    net, widths = network()
    randomised(net)
    seen: list[dict[str, int]] = []

    def fake_ms(cut_: nn.Module) -> float:
        sizes = discover(cut_, X).sizes()
        first: Any = cut_[0]  # type: ignore[index]
        assert torch.equal(first.weight, net[0].weight[: len(first.weight)])
        assert cut_(X).shape == (1, 5)
        seen.append(sizes)
        return 1e-3 * macs_by_hand(sizes)

    budgets = [0.3e-3 * macs_by_hand(widths.sizes()), 0.7e-3 * macs_by_hand(widths.sizes())]
    before = {n: t.clone() for n, t in net.state_dict().items()}
    found = level_sizes(net, widths, X, budgets, "latency_ms", multiple, fake_ms)
    for sizes, budget in zip(found, budgets, strict=True):
        assert sizes in seen, "what is taken has been measured"
        largest_within(sizes, budget, multiple, lambda sizes: 1e-3 * macs_by_hand(sizes))
    nestedness(found)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert widths.sizes() == dict(zip(NAMES, CHANNELS, strict=True))


@pytest.mark.parametrize("by", ["fraction", "macs"])
def test_where_latency_is_not_asked_for_nothing_is_measured(by: Any) -> None:
    net, widths = network()

    def measured(cut_: nn.Module) -> float:
        raise AssertionError("it was")

    level = 0.5 if by == "fraction" else 0.5 * macs_by_hand(widths.sizes())
    given_ = level_sizes(net, widths, X, [level], by)
    assert level_sizes(net, widths, X, [level], by, latency_ms=measured) == given_


# --- a network of given sizes ------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=5)
def test_resized_holds_the_first_channels(data: st.DataObject) -> None:
    """By hand on the whole state."""
    net, widths = network()
    randomised(net)
    sizes = {n: data.draw(st.integers(1, w.size)) for n, w in widths.items()}
    twin = make_resized(net, widths, sizes)
    small = convnet([sizes[n] for n in NAMES], in_channels=3, classes=5)
    assert repr(twin) == repr(small)
    for name, tensor in small.state_dict().items():
        first = net.state_dict()[name][tuple(map(slice, tensor.shape))]
        assert torch.equal(twin.state_dict()[name], first), name
    assert counts.count_macs(twin, X) == macs_by_hand(sizes)
    assert widths.sizes() == dict(zip(NAMES, CHANNELS, strict=True))


# --- refusals ----------------------------------------------------------------------------------------------

MOST = macs_by_hand(dict(zip(NAMES, CHANNELS, strict=True)))
LEAST = macs_by_hand(dict.fromkeys(NAMES, 1))
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown kind": (
        {"levels": [0.5], "by": "flops"},
        "'flops': choose fraction, macs, latency_ms",
    ),
    "no level": ({"levels": []}, "levels [] do not ascend"),
    "descending": ({"levels": [0.8, 0.5]}, "levels [0.8, 0.5] do not ascend"),
    "twice the same": ({"levels": [0.5, 0.5]}, "do not ascend"),
    "none": ({"levels": [0.0]}, "0.0 is no fraction"),
    "less than none": ({"levels": [-0.5, 0.5]}, "-0.5 is no fraction"),
    "the whole": ({"levels": [0.5, 1]}, "1 is no fraction"),
    "more than the whole": ({"levels": [1.5]}, "1.5 is no fraction"),
    "no number": ({"levels": [float("nan")]}, "levels [nan] do not ascend"),
    "too small a budget": ({"levels": [LEAST - 1], "by": "macs"}, f"{LEAST:g} is the least"),
    "too small with a multiple": (
        {"levels": [2 * LEAST], "by": "macs", "multiple": 8},
        "lower the multiple",
    ),
    "the whole network": (
        {"levels": [MOST], "by": "macs"},
        f"the whole network takes macs={MOST:g}",
    ),
    "budgets that descend": ({"levels": [2 * LEAST, LEAST], "by": "macs"}, "do not ascend"),
    "a multiple of none": ({"levels": [0.5], "multiple": 0}, "multiple"),
    "a multiple of less": ({"levels": [2 * LEAST], "by": "macs", "multiple": -2}, "multiple"),
    "a multiple of a part": ({"levels": [0.5], "multiple": 1.5}, "multiples of 1.5"),
    "a budget that is no number": ({"levels": [float("nan")], "by": "macs"}, "do not ascend"),
    "a last budget that is no number": ({"levels": [2 * LEAST, float("nan")], "by": "macs"}, "do not ascend"),
    "latency without a measure": ({"levels": [1.0], "by": "latency_ms"}, "latency_ms"),
}
OF_THE_NETWORK = {"too small a budget", "too small with a multiple", "the whole network"}


@pytest.mark.parametrize("what", WRONG)
def test_levels_that_cannot_be_are_refused(what: str) -> None:
    net, widths = network()
    options, named = WRONG[what]
    with pytest.raises(StructureError if what in OF_THE_NETWORK else OptionError) as caught:
        level_sizes(net, widths, X, **options)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("ms", "named"), [(9.0, "9 is the least"), (1.0, "takes latency_ms=1")])
def test_latency_budgets_that_cannot_be_are_refused(ms: float, named: str) -> None:
    net, widths = network()
    with pytest.raises(StructureError, match=named):
        level_sizes(net, widths, X, [2.0], "latency_ms", latency_ms=lambda _: ms)


def test_a_fraction_leaves_one_channel_at_least() -> None:
    """Also of a width of one channel, as the bottlenecks of small squeeze and excitation have."""
    net = convnet((1, 8), (), in_channels=3, classes=5)
    widths = discover(net, X)
    assert level_sizes(net, widths, X, [0.05, 0.5]) == [{"0": 1, "3": 1}, {"0": 1, "3": 4}]


@pytest.mark.parametrize("by", ["fraction", "macs"])
def test_a_network_whose_widths_leave_no_room_for_a_level_says_so(by: Any) -> None:
    """It said that two levels were the same, and to ask for larger steps."""
    net, x = CASES["weight_norm"].model(), CASES["weight_norm"].example()
    widths = discover(net, x)
    refusal = r"a norm or a constraint computes .*, which leaves no room"
    with pytest.raises(StructureError, match=refusal) as caught:
        level_sizes(net, widths, x, [0.5 if by == "fraction" else counts.count_macs(net, x) / 2], by)
    assert all(name in str(caught.value) for name in widths) and "\n" not in str(caught.value)
    with pytest.raises(StructureError, match="leaves no room for a level"):
        Levels(net, widths, [{}])


def test_levels_that_come_out_the_same_say_where() -> None:
    net, widths = network()
    with pytest.raises(
        StructureError, match="levels 0 and 1 are the same: the widest, '10', has 12 channels"
    ):
        Levels(net, widths, level_sizes(net, widths, X, [0.51, 0.515]))
