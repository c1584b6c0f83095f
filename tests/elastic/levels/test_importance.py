"""Each measure against sums by hand over all writers of a channel; order against the definition of one."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.errors import ElasticError, OptionError, StructureError
from elastic.levels.importance import rank_channels, score_channels
from elastic.levels.nested import Levels
from elastic.levels.sizes import make_resized
from elastic.models import resnet20
from elastic.pruning import gates
from elastic.widths.discovery import discover
from elastic.widths.width import Widths
from tests.elastic.zoo import CASES, Net, conv, differences, head, randomised, states

WRITERS = {"stem": ("stem", "two", "four"), "one": ("one",), "three": ("three",)}  # of each width
NORMS = {"stem": ("bn0", "bn2", "bn4"), "one": ("bn1",), "three": ("bn3",)}


def blocks(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.bn0(m.stem(x)))
    x = F.relu(x + m.bn2(m.two(F.relu(m.bn1(m.one(x))))))
    return m.head(F.relu(x + m.bn4(m.four(F.relu(m.bn3(m.three(x)))))))


def trunk() -> tuple[Any, Widths]:
    """A residual trunk of 4 channels that three convolutions write, two hidden widths, norms everywhere."""
    torch.manual_seed(0)
    layers = dict(stem=conv(3, 4, 3, bias=False), one=conv(4, 6, 3, bias=False), two=conv(6, 4, 3))
    layers |= dict(three=conv(4, 5, 1), four=conv(5, 4, 3, bias=False))
    sizes = {"bn0": 4, "bn1": 6, "bn2": 4, "bn3": 5, "bn4": 4}
    norms = {name: nn.BatchNorm2d(size) for name, size in sizes.items()}
    net = randomised(Net(blocks, **layers, **norms, head=head(4)))
    with torch.no_grad():
        for name in norms:
            net.get_submodule(name).weight[1::2].neg_()  # type: ignore[union-attr, index, operator]
    return net.eval(), discover(net, x_BCHW())


def x_BCHW(seed: int = 1) -> Tensor:
    return torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def batches(*seeds: int) -> list[tuple[Tensor, Tensor]]:
    return [(x_BCHW(seed), (torch.arange(6) + seed) % 5) for seed in seeds]


def rows(net: Any, layer: str) -> np.ndarray:
    weight = net.get_submodule(layer).weight.detach().double().numpy()
    return weight.reshape(len(weight), -1)  # type: ignore[no-any-return]


BY_HAND: dict[Any, Any] = {
    "l2": lambda net, name: np.sqrt(sum((rows(net, w) ** 2).sum(1) for w in WRITERS[name])),
    "l1": lambda net, name: sum(np.abs(rows(net, w)).sum(1) for w in WRITERS[name]),
    "norm": lambda net, name: sum(np.abs(rows(net, n)).sum(1) for n in NORMS[name]),
}


@pytest.mark.parametrize("how", BY_HAND)
def test_sums_over_all_writers(how: Any) -> None:
    net, widths = trunk()
    assert {n: w.size for n, w in widths.items()} == {"stem": 4, "one": 6, "three": 5}
    found = score_channels(net, widths, how)
    assert found.keys() == widths.keys()
    for name, scores in found.items():
        assert scores.shape == (widths[name].size,)
        np.testing.assert_allclose(scores.numpy(), BY_HAND[how](net, name), rtol=1e-5)


@pytest.mark.parametrize("how", ["l2", "l1"])
def test_all_copies_of_a_channel_count(how: Any) -> None:
    """chunk(2): channel c is rows c and c + 4 of the convolution."""
    case = CASES["chunk"]
    net = case.model()
    weight = rows(net, "conv").reshape(2, 4, -1)
    expected = np.sqrt((weight**2).sum((0, 2))) if how == "l2" else np.abs(weight).sum((0, 2))
    scores = score_channels(net, discover(net, case.example()), how)["conv"]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_taylor_is_how_the_loss_feels_a_writer_of_the_channel(count: int) -> None:
    """|dL/dα| where a writer's row is scaled by α, by central differences; the writers' are added."""
    net, widths = trunk()
    given_ = batches(*range(count))
    found = score_channels(net, widths, "taylor", given_)
    twin = net.double()

    @torch.no_grad()
    def loss() -> float:
        return sum(F.cross_entropy(twin(x.double()), y).item() for x, y in given_)

    for name, width in widths.items():
        for channel in range(width.size):
            felt = 0.0
            for layer in WRITERS[name]:
                row = twin.get_submodule(layer).weight.data[channel]
                held, at = row.clone(), []
                for scale in (1 + 1e-4, 1 - 1e-4):
                    row.copy_(held * scale)
                    at.append(loss())
                row.copy_(held)
                felt += abs(at[0] - at[1]) / 2e-4
            assert found[name][channel].item() == pytest.approx(felt, rel=2e-3, abs=1e-6), (name, channel)


def test_taylor_against_autograd_by_hand() -> None:
    net, widths = trunk()
    found = score_channels(net, widths, "taylor", batches(3))
    x, y = batches(3)[0]
    F.cross_entropy(net(x), y).backward()
    for name, scores in found.items():
        layers = [net.get_submodule(layer) for layer in WRITERS[name]]
        expected = sum((m.weight * m.weight.grad).flatten(1).sum(1).abs() for m in layers)
        torch.testing.assert_close(scores, expected.detach(), rtol=1e-4, atol=1e-7)


def test_taylor_leaves_out_weights_that_are_computed() -> None:
    net, _ = trunk()
    expected = score_channels(net, discover(net, x_BCHW()), "taylor", batches(3))
    nn.utils.parametrizations.weight_norm(net.head[-1])
    found = score_channels(net, discover(net, x_BCHW()), "taylor", batches(3))
    for name, scores in found.items():
        torch.testing.assert_close(scores, expected[name])


@pytest.mark.parametrize("grain", ["weight", "kernel", "block", "channel"])
def test_gates_are_added_at_every_grain(grain: Any) -> None:
    """Σσ over as many gates as the grain has a row; where one holds a whole channel, a writer adds one σ."""
    net, widths = trunk()
    gates.attach_gates(net, widths, grain)
    drawn = torch.Generator().manual_seed(4)
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data.copy_(3 * torch.randn(gate.score.shape, generator=drawn))
    found = score_channels(net, widths, "gate")
    for name, scores in found.items():
        expected = np.zeros(widths[name].size)
        for layer in WRITERS[name]:
            module = net.get_submodule(layer)
            score = module.parametrizations.weight[0].score.detach().double().numpy()
            _, read, high, wide = module.weight.shape
            entries = score.reshape(len(score), {"weight": read * high * wide, "channel": 1}.get(grain, read))
            expected += (1 / (1 + np.exp(-entries))).sum(1)
        np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)


def test_of_a_gated_network_the_weights_that_are_stored_count() -> None:
    net, widths = trunk()
    expected = score_channels(net, widths, "l2")
    gates.attach_gates(net, widths, "weight")
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data.fill_(-1.0)
    for name, scores in score_channels(net, widths, "l2").items():
        assert torch.equal(scores, expected[name])


@pytest.mark.parametrize("how", ["l2", "l1", "norm", "taylor"])
def test_looking_changes_nothing(how: Any) -> None:
    net, widths = trunk()
    net.train()
    optimizer = torch.optim.Adam(net.parameters())
    F.cross_entropy(net(x_BCHW()), batches(1)[0][1]).backward()
    optimizer.step()
    before, mode = states(net, optimizer), [m.training for m in net.modules()]
    drawn = torch.get_rng_state()
    score_channels(net, widths, how, batches(1, 2))
    assert not differences(before, states(net, optimizer)) and mode == [m.training for m in net.modules()]
    assert torch.equal(drawn, torch.get_rng_state())


@pytest.mark.parametrize("how", ["l2", "l1", "norm", "taylor"])
def test_a_level_is_judged_as_the_network_it_is(how: Any) -> None:
    torch.manual_seed(0)
    net = randomised(resnet20(4, classes=5))
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    widths = discover(net, x)
    sizes = {name: max(1, width.size // 2) for name, width in widths.items()}
    levels = Levels(net, widths, [sizes])  # its norms are the network's first
    own = make_resized(net, widths, sizes)
    given_ = [(x, torch.arange(4))]
    expected = score_channels(own, discover(own, x), how, given_)
    found = score_channels(levels[0], discover(levels[0], x), how, given_)
    for name, scores in found.items():
        assert len(scores) == sizes[name]
        torch.testing.assert_close(scores, expected[name], rtol=1e-3, atol=1e-6)
    assert not any(p.grad is not None for p in (*net.parameters(), *levels.norms.parameters()))


def test_a_channel_is_worth_what_all_its_writers_put_into_it() -> None:
    """One that the stem does not write, but the blocks do, is not the last."""
    net, widths = trunk()
    with torch.no_grad():
        for layer in ("stem", "two", "four"):
            net.get_submodule(layer).weight.fill_(0.1)  # type: ignore[union-attr]
        net.stem.weight[2] = 0
        net.two.weight[2] = 1
        net.four.weight[3] = 0
    for how in ("l2", "l1"):
        assert rank_channels(score_channels(net, widths, how)["stem"]).tolist()[0] == 2
        assert rank_channels(score_channels(net, widths, how)["stem"]).tolist()[-1] == 3


# --- order -----------------------------------------------------------------------------------------------

scores_with_ties = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]) | st.floats(0, 10), min_size=1)


@given(scores_with_ties, st.integers(0, 5))
@settings(max_examples=40)
def test_order_is_the_stable_permutation_with_the_best_first(values: list[float], more: int) -> None:
    index = rank_channels(torch.tensor(values, dtype=torch.float64), len(values) + more)
    expected = sorted(range(len(values)), key=lambda i: -values[i])  # Python sorts stably
    assert index.tolist() == expected + list(range(len(values), len(values) + more))


def test_the_size_is_that_of_the_scores_unless_given() -> None:
    assert rank_channels(torch.tensor([1.0, 3.0, 2.0])).tolist() == [1, 2, 0]


# --- refusals --------------------------------------------------------------------------------------------


def refused(
    how: Any, named: str, net: nn.Module, widths: Widths, kind: type[ElasticError] = StructureError
) -> None:
    with pytest.raises(kind, match=named) as caught:
        score_channels(net, widths, how)
    assert "\n" not in str(caught.value)


def test_what_a_measure_lacks_is_said() -> None:
    refused("l3", "there is no importance 'l3': choose l2, l1, taylor, norm, gate", *trunk(), OptionError)
    refused("taylor", "'taylor' needs batches", *trunk(), OptionError)
    with pytest.raises(OptionError, match="'taylor' needs batches"):
        score_channels(*trunk(), "taylor", [])
    cut = Net(lambda m, x: m.head(m.last(m.stem(x).detach())), stem=conv(3, 4), last=conv(4, 4), head=head(4))
    with pytest.raises(StructureError, match="stem gets no gradient: choose another importance"):
        score_channels(cut, discover(cut, x_BCHW()), "taylor", batches(3))
    refused("gate", "has no gates: choose another importance", *trunk())
    case = CASES["residual"]
    net = case.model()
    refused("norm", "no norm lies on width 'one'", net, discover(net, case.example()))
    net, widths = trunk()
    gates.attach_gates(net, widths, "weight")
    refused("nonsense", "'nonsense'", net, widths, OptionError)
