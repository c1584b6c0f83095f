"""Gates closed to a size, and weights ranked by magnitude, against orderings and counts of the test's own."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elastic.errors import OptionError
from elastic.measure import counts
from elastic.models import convnet
from elastic.pruning import gates
from elastic.pruning.compaction import compact
from elastic.pruning.fitting import (
    check_budget_reachable,
    fit_gates_to_budget,
    keep_largest_weights,
    measure_compacted,
    report_budget,
)
from elastic.pruning.ranking import keep_best_gates
from elastic.surgery.reindexing import grow_index, reindex
from elastic.widths.discovery import discover
from elastic.widths.parameters import get_weight

EXAMPLE = torch.zeros(1, 1, 8, 8)


def gated_net(grain: gates.Grain = "weight", seed: int = 0, channels: tuple[int, ...] = (6, 8)) -> nn.Module:
    torch.manual_seed(seed)
    net = convnet(channels)
    gates.attach_gates(net, discover(net, EXAMPLE), grain)
    return net


def layers(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Of each gated layer: |w| and which gates are open."""
    return [
        (layer.parametrizations.weight.original.detach().abs(), gate.score > 0)  # type: ignore[union-attr,index]
        for _, layer, gate in gates.iterate_gates(net)
    ]


def params(net: nn.Module) -> int:
    return counts.count_params(compact(net, EXAMPLE))


@pytest.mark.parametrize("count", [400, 200, 60])
def test_the_largest_weights_of_all_layers_stay(count: int) -> None:
    """Against a sort of all magnitudes; the logits' weights are larger than the others here."""
    net = gated_net()
    keep_largest_weights(net, count)
    found = layers(net)
    best = {float(magnitude.max()) for magnitude, _ in found}
    every = sorted((float(m) for magnitude, _ in found for m in magnitude.flatten()), reverse=True)
    kept = sorted((float(m) for magnitude, open_ in found for m in magnitude[open_]), reverse=True)
    rest = [m for m in every if m not in best]
    assert len(kept) == count
    assert kept == sorted([*best, *rest[: count - len(best)]], reverse=True)
    shares = [float(open_.float().mean()) for _, open_ in found]
    assert max(shares) - min(shares) > 0.1, "ranked within layers"


def test_one_weight_a_layer_stays() -> None:
    net = gated_net()
    keep_largest_weights(net, 0)
    for magnitude, open_ in layers(net):
        assert open_.sum() == 1 and magnitude[open_] == magnitude.max()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 700), min_size=2, max_size=4), st.integers(0, 99))
def test_what_is_closed_stays_closed(counts: list[int], seed: int) -> None:
    """Whatever becomes of the weights, and be there room again, or a layer without any gate open."""
    net = gated_net(seed=seed)
    draw = torch.Generator().manual_seed(seed)
    shut = next(gate for _, _, gate in gates.iterate_gates(net))
    for i, count in enumerate(counts):
        before = [open_ for _, open_ in layers(net)]
        with torch.no_grad():
            if i == 1:
                shut.score.fill_(-1.0)
                before[0] = shut.score > 0
            for _, layer, _ in gates.iterate_gates(net):
                held = layer.parametrizations.weight.original  # type: ignore[union-attr,index]
                held.copy_(torch.randn(held.shape, generator=draw))
        keep_largest_weights(net, count)
        now = [open_ for _, open_ in layers(net)]
        assert all((was | ~is_).all() for was, is_ in zip(before, now, strict=True))
        wanted = max(
            min(count, sum(int(was.sum()) for was in before)), sum(bool(was.any()) for was in before)
        )
        lost = sum(not was.any() for was in before)  # the place that a layer would have had
        assert wanted - lost <= sum(int(is_.sum()) for is_ in now) <= wanted


@pytest.mark.parametrize("target", [560, 300, 150, 90])
def test_the_compacted_network_has_the_size_asked_for(target: int) -> None:
    net = gated_net()
    fit_gates_to_budget(net, target, keep_largest_weights, lambda: params(net))
    assert params(net) == target


@pytest.mark.parametrize(
    ("grain", "target"),
    [("weight", 450), ("weight", 200), ("kernel", 200), ("kernel", 100), ("block", 400), ("channel", 450)],
)
def test_one_gate_more_would_be_too_many(grain: gates.Grain, target: int) -> None:
    """Scores are random, some gates are closed; a gate counts for the weights behind it."""
    net = gated_net(grain)
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data = torch.randn_like(gate.score)
    held = [gate.score.detach().clone() for _, _, gate in gates.iterate_gates(net)]
    fit_gates_to_budget(net, target, keep_best_gates, lambda: params(net))
    got, kept = params(net), int(gates.count_open(net))
    assert got <= target
    for count in range(kept, int(gates.count_gated(net)) + 1):  # to the next gate that opens
        for (_, _, gate), score in zip(gates.iterate_gates(net), held, strict=True):
            gate.score.data = score.clone()
        keep_best_gates(net, count)
        if gates.count_open(net) > kept:
            break
    assert gates.count_open(net) > kept and (got == target or params(net) > target)


def test_gates_open_again_where_there_is_room() -> None:
    net = gated_net()
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data = torch.rand_like(gate.score) - 0.9
    before = params(net)
    fit_gates_to_budget(net, 400, keep_best_gates, lambda: params(net))
    assert before < 200 and params(net) == 400


@pytest.mark.parametrize("keep", [keep_best_gates, keep_largest_weights])
def test_all_stays_where_all_fits(keep: object) -> None:
    net = gated_net()
    fit_gates_to_budget(net, 10_000, keep, lambda: params(net))  # type: ignore[arg-type]
    assert all(open_.all() for _, open_ in layers(net))


@pytest.mark.parametrize("keep", [keep_best_gates, keep_largest_weights])
def test_what_cannot_be_met_is_met_as_nearly_as_can_be(keep: object) -> None:
    net = gated_net()
    fit_gates_to_budget(net, 1, keep, lambda: params(net))  # type: ignore[arg-type]
    assert [int(open_.sum()) for _, open_ in layers(net)] == [1, 1, 1]


def test_a_few_tries_do() -> None:
    """Halving would take 11; each costs a compaction."""
    for target, channels in ((1500, (16, 16)), (800, (12, 14)), (400, (16, 16))):
        net, tries = gated_net(channels=channels), 0

        def measure(net: nn.Module = net) -> int:
            nonlocal tries
            tries += 1
            return params(net)

        fit_gates_to_budget(net, target, keep_largest_weights, measure)
        assert tries <= 8 and params(net) == target


def test_the_memory_format_stays() -> None:
    """A resumed run loads into the one that a new network has."""
    net = gated_net().to(memory_format=torch.channels_last)
    before = [gate.score.stride() for _, _, gate in gates.iterate_gates(net)]
    fit_gates_to_budget(net, 300, keep_largest_weights, lambda: params(net))
    assert [gate.score.stride() for _, _, gate in gates.iterate_gates(net)] == before
    assert not any(gate.score.grad_fn for _, _, gate in gates.iterate_gates(net))


# --- budgets that cannot be met -----------------------------------------------------------------------------


@pytest.mark.parametrize("grain", ["weight", "kernel", "block", "channel"])
@pytest.mark.parametrize("by", ["params", "macs"])
def test_the_least_that_a_network_can_be_is_not_refused_and_less_is(grain: gates.Grain, by: str) -> None:
    net = gated_net(grain)
    least = copy.deepcopy(net)
    keep_best_gates(least, 0)
    stays = measure_compacted(least, EXAMPLE, by)
    check_budget_reachable(net, EXAMPLE, stays, by)
    said = f"a budget of {stays - 1} {by} cannot be reached: {stays} stay"
    with pytest.raises(OptionError, match=said) as caught:
        check_budget_reachable(net, EXAMPLE, stays - 1, by)
    assert "\n" not in str(caught.value)


def test_the_size_in_macs_is_the_flop_counter_s_where_nothing_is_zero() -> None:
    net = gated_net("channel")
    keep_best_gates(net, 0.4 * gates.count_gated(net))
    assert measure_compacted(net, EXAMPLE, "macs") == counts.count_macs(compact(net, EXAMPLE), EXAMPLE)
    assert measure_compacted(net, EXAMPLE) == params(net)


@pytest.mark.parametrize(
    ("grain", "target", "why"),
    [
        ("weight", 300, None),
        ("weight", 10_000, "all gates that are left are open"),
        ("channel", 310, "one gate more"),
        ("weight", 5, "every layer keeps one gate"),
    ],
)
def test_a_budget_that_is_missed_says_why(grain: gates.Grain, target: int, why: str | None) -> None:
    net = gated_net(grain)
    fit_gates_to_budget(net, target, keep_best_gates, lambda: params(net))
    report = report_budget(net, EXAMPLE, target)
    assert (report["budget/target"], report["budget/actual"]) == (target, params(net))
    assert (abs(params(net) - target) <= 0.02 * target) == (why is None) == ("budget/reason" not in report)
    assert why is None or report["budget/reason"].startswith(why)


def test_weights_that_will_not_stay_zero_are_counted_when_gates_are_settled() -> None:
    """A gate that was shut when a channel came opens again: its weight of the new channel is still zero."""
    net = gated_net("channel", channels=(4, 6))
    shut = [gate for _, _, gate in gates.iterate_gates(net)][1].score.data
    shut[:3] = -0.1
    reindex(net, discover(net, EXAMPLE), {"0": grow_index(4, 4)})
    with torch.no_grad():
        weights = [get_weight(layer) for _, layer, _ in gates.iterate_gates(net)]
        weights[1][3:, 4:] = 1  # trained since, where the gate was open
    shut[:3] = 0.1
    then = measure_compacted(net, EXAMPLE, count_zeros=True)
    assert then - params(net) == 3 * 4 * 9 + 8 + 6, "and shifts, which begin at zero"
    for name, parameter in net.named_parameters():
        if not name.endswith("score"):
            parameter.data[parameter == 0] = 1e-3
    assert params(net) == then
