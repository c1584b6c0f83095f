"""Gates against straight-through gradients built of torch's own operations, and against counts by hand."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from elastic.pruning import gates
from elastic.pruning.compaction import compact
from elastic.pruning.dead import find_removable_channels
from elastic.pruning.folding import compute_mask, fold_gates
from elastic.pruning.gates import BLOCK, START, Gate, Grain
from elastic.pruning.penalty import add_penalty_gradient
from elastic.pruning.ranking import REOPENED, keep_best_gates, reopen_gates
from elastic.surgery.reindexing import FRESH, grow_index, reindex
from elastic.widths.discovery import discover
from elastic.widths.parameters import get_original as held_original
from elastic.widths.width import Widths
from tests.elastic.pruning.grains import GRAINS, every_case_and_grain, every_grain
from tests.elastic.pruning.sums import compute_penalty
from tests.elastic.zoo import Case, Net, conv, differences, head, states

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
    "linear": (lambda: nn.Linear(4, 6), (2, 4)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "signal": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 5)),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def score_shape(weight: Tensor, grain: Grain) -> tuple[int, ...]:
    kept = {"weight": weight.dim(), "kernel": 2, "block": 2, "channel": 1}[grain]
    return (*weight.shape[:kept], *[1] * (weight.dim() - kept))


def one_gate(layer: str, grain: Grain) -> tuple[Any, Gate, Tensor, Tensor]:
    """A layer gated at random: (layer, gate, plain weight, input)."""
    torch.manual_seed(0)
    module, x = LAYERS[layer][0](), torch.randn(LAYERS[layer][1])
    weight = module.weight.detach().clone()
    gate = Gate(weight, grain)
    parametrize.register_parametrization(module, "weight", gate)
    gate.score.data.normal_()
    gate.score.data.view(-1)[0] = 0.0  # the threshold itself is closed
    gate.score.data.view(-1)[1] = 0.5
    return module, gate, weight, x


def network() -> nn.Sequential:
    """Widths "0" (4 channels, a norm follows) and "3" (6 channels, a bias, no norm); logits "6.2"."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(conv(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(conv(4, 6, 3), nn.ReLU(), nn.Dropout(0.0), head(6)),
    )
    norm: Any = net[1]
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    return net


def gated_network(grain: Grain, spread: float = 1.0, grace: int = 0) -> tuple[Any, Widths]:
    net = network()
    widths = discover(net, X)
    gates.attach_gates(net, widths, grain, grace)
    scatter(net, spread)
    return net, widths


def scatter(net: nn.Module, spread: float = 1.0, seed: int = 0) -> None:
    """Distinct scores, about half of them closed."""
    drawn = torch.Generator().manual_seed(seed)
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data = torch.randn(gate.score.shape, generator=drawn) * spread


def original(layer: nn.Module, tensor: str) -> Any:
    return held_original(layer, tensor)


def found(net: nn.Module) -> dict[str, Gate]:
    return {path: gate for path, _, gate in gates.iterate_gates(net)}


def masks(net: nn.Module) -> dict[str, Tensor]:
    return {path: gate.score.detach() > 0 for path, gate in found(net).items()}


def open_weights(net: nn.Module) -> int:
    """Weights behind open gates, one by one."""
    return sum(
        int((gate.score > 0).expand_as(original(layer, "weight")).sum())
        for _, layer, gate in gates.iterate_gates(net)
    )


# --- one gate ------------------------------------------------------------------------------------------


@every_layer
@every_grain
def test_the_forward_is_the_weight_where_the_score_is_positive(layer: str, grain: Grain) -> None:
    module, gate, weight, x = one_gate(layer, grain)
    assert tuple(gate.score.shape) == score_shape(weight, grain)
    expected = torch.where(gate.score.expand_as(weight) > 0, weight, 0.0)
    assert torch.equal(module.weight, expected)
    assert 0 < int(expected.count_nonzero()) < weight.numel()
    plain = LAYERS[layer][0]()
    plain.load_state_dict({"weight": expected, "bias": module.bias})
    assert torch.equal(module(x), plain(x))


@every_layer
@every_grain
def test_the_gradient_is_that_of_a_logistic_curve(layer: str, grain: Grain) -> None:
    """4·σ has the derivative 4·σ(1 − σ); adding it less its own value leaves the hard forward."""
    module, gate, weight, x = one_gate(layer, grain)
    module(x).square().sum().backward()
    its_weight, its_score = original(module, "weight").grad, gate.score.grad

    twin = LAYERS[layer][0]()
    w, s = weight.clone().requires_grad_(), gate.score.detach().clone().requires_grad_()
    soft = 4 * torch.sigmoid(s)
    masked = w * ((s > 0).float() + soft - soft.detach())
    y = torch.func.functional_call(twin, {"weight": masked, "bias": module.bias.detach()}, (x,))
    y.square().sum().backward()
    torch.testing.assert_close(its_weight, w.grad)
    assert its_score is not None and s.grad is not None
    if grain == "block":  # these layers have but one
        s.grad = s.grad.mean(0, keepdim=True).expand_as(s)
        assert torch.equal(its_score, its_score[:1].expand_as(s)), "all of a block, to the last bit"
    torch.testing.assert_close(its_score, s.grad)
    assert not its_weight[(gate.score <= 0).expand_as(weight)].any(), "a closed gate's weight rests"
    assert its_score.count_nonzero() == its_score.numel(), "closed gates feel the loss too"


def test_a_norms_scalars_can_share_a_layers_channel_gate() -> None:
    layer, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    nn.init.ones_(norm.bias)
    gate = Gate(layer.weight, "channel")
    gate.score.data.copy_(torch.tensor([1.0, -1.0, 2.0, 0.0]).view(4, 1, 1, 1))
    for module, tensor in ((layer, "weight"), (layer, "bias"), (norm, "weight"), (norm, "bias")):
        parametrize.register_parametrization(module, tensor, gate)
    assert norm.weight.tolist() == norm.bias.tolist() == [1.0, 0.0, 1.0, 0.0]
    y = norm(layer(X))
    assert not y[:, [1, 3]].any() and y[:, 0].any()
    y.square().sum().backward()
    assert gate.score.grad is not None and gate.score.grad.shape == (4, 1, 1, 1)


def toy(inputs: int) -> tuple[nn.Sequential, Gate]:
    net = nn.Sequential(nn.Linear(inputs, 1, bias=False))
    gate = Gate(net[0].weight, "weight")
    parametrize.register_parametrization(net[0], "weight", gate)
    return net, gate


def test_a_closed_gate_opens_again_where_the_loss_asks_for_it() -> None:
    net, gate = toy(1)
    nn.init.ones_(original(net[0], "weight"))
    gate.score.data.fill_(-0.5)
    x = torch.linspace(-1, 1, 16).view(-1, 1)
    assert not net(x).any()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        F.mse_loss(net(x), x).backward()
        optimizer.step()
    assert gate.score.item() > 0
    assert F.mse_loss(net(x), x) < 1e-3


def test_gates_close_where_the_loss_does_not_need_them() -> None:
    torch.manual_seed(0)
    net, gate = toy(8)
    x = torch.randn(256, 8)
    y = x[:, :4] @ torch.tensor([[1.0], [-1.0], [0.5], [-0.5]])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (F.mse_loss(net(x), y) + 0.02 * compute_penalty(net)).backward()
        optimizer.step()
    assert (gate.score > 0).tolist() == [[True] * 4 + [False] * 4]
    assert F.mse_loss(net(x), y) < 0.01


# --- what is gated --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", ["weight", "kernel"])
def test_all_that_widths_reach_is_gated(grain: Grain) -> None:
    net, _ = gated_network(grain)
    assert list(found(net)) == ["0", "3", "6.2"]
    assert not parametrize.is_parametrized(net[1])


def test_at_channel_grain_the_norm_is_gated_along_and_the_logits_are_not() -> None:
    net, _ = gated_network("channel")
    assert list(found(net)) == ["0", "3"]
    assert not parametrize.is_parametrized(net[6][2])
    assert parametrize.is_parametrized(net[1], "weight") and parametrize.is_parametrized(net[1], "bias")
    assert parametrize.is_parametrized(net[3], "bias")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_closed_channel_is_exactly_zero(training: bool) -> None:
    net, _ = gated_network("channel")
    net.train(training)
    seen: dict[int, Tensor] = {}
    for i in (1, 3):
        net[i].register_forward_hook(lambda module, args, y, i=i: seen.update({i: y}))
    net(X)
    for i, path in ((1, "0"), (3, "3")):
        is_open = masks(net)[path].flatten()
        assert 0 < int(is_open.sum()) < len(is_open)
        assert not seen[i][:, ~is_open].any()
        assert seen[i][:, is_open].abs().amax((0, 2, 3)).gt(0).all()


def test_a_closed_channel_is_a_constant_behind_a_norm_without_parameters() -> None:
    """There is no shift to gate: what stays in evaluation mode is -mean/std, and compaction carries it."""
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, affine=False), nn.ReLU(), head(4)).eval()
    assert isinstance(net[1].running_mean, Tensor)
    net[1].running_mean.fill_(-1.0)
    gates.attach_gates(net, discover(net, X), "channel")
    found(net)["0"].score.data[1] = -1
    seen = net[2](net[1](net[0](X)))[:, 1]
    assert torch.equal(seen, seen[0, 0, 0].expand_as(seen)) and seen[0, 0, 0] > 0
    torch.testing.assert_close(compact(net, X)(X), net(X))


def norm_first() -> Net:
    """The norm is registered before the convolution that it follows, as in many pre-activation blocks."""
    torch.manual_seed(0)
    return Net(
        lambda m, x: m.head(F.relu(m.bn(m.conv(x)))),
        **dict(bn=nn.BatchNorm2d(4), conv=conv(3, 4, 3), head=head(4)),
    )


def test_the_order_in_which_modules_are_registered_does_not_matter() -> None:
    net = norm_first()
    gates.attach_gates(net, discover(net, X), "channel")
    assert list(found(net)) == ["conv"]
    assert gates.count_open(net) == 4 * 27
    expected = 4 * 27 * torch.sigmoid(torch.tensor(START))
    torch.testing.assert_close(compute_penalty(net).detach(), expected)


@every_grain
def test_a_gated_model_has_the_same_widths(grain: Grain) -> None:
    net, widths = gated_network(grain)
    again = discover(net, X)
    assert again.sizes() == widths.sizes()
    assert {n: w.slots for n, w in again.items()} == {n: w.slots for n, w in widths.items()}


@every_grain
def test_open_gates_change_nothing(grain: Grain) -> None:
    net = network()
    expected = copy.deepcopy(net)(X)
    gates.attach_gates(net, discover(net, X), grain)
    assert torch.equal(net(X), expected)


def test_counts_by_hand() -> None:
    net, _ = gated_network("kernel")
    for gate in found(net).values():
        gate.score.data.fill_(1.0)
    found(net)["0"].score.data[1] = -1  # 3 of 12 kernels
    found(net)["3"].score.data[:, 1] = -1  # 6 of 24 kernels
    found(net)["6.2"].score.data[:2] = -1  # 12 of 30 weights
    assert gates.count_open(net) == open_weights(net) == 9 * 9 + 18 * 9 + 18
    assert gates.count_gated(net) == 12 * 9 + 24 * 9 + 30
    assert gates.count_open_gates(net) == [9, 18, 18]
    assert gates.count_open_gates(network()) == []


@every_grain
def test_the_mask_of_a_layers_tensor(grain: Grain) -> None:
    net, _ = gated_network(grain)
    for path, gate in found(net).items():
        layer = net.get_submodule(path)
        mask = compute_mask(layer, "weight")
        assert torch.equal(mask, (gate.score > 0).expand_as(layer.weight).float())
    assert compute_mask(network()[0], "weight").eq(1).all()


# --- penalty ----------------------------------------------------------------------------------------------


@every_grain
def test_the_penalty_against_a_sum_over_single_weights(grain: Grain) -> None:
    net, _ = gated_network(grain)
    drawn = torch.Generator().manual_seed(3)
    for i, gate in enumerate(found(net).values()):
        gate.price = 0.5 + i
        gate.grace.copy_(torch.randint(0, 3, gate.grace.shape, generator=drawn))
    compute_penalty(net).backward()

    total, spared = 0.0, 0
    for _, layer, gate in gates.iterate_gates(net):
        weight = original(layer, "weight")
        expected = torch.zeros_like(gate.score)
        for place in torch.ones_like(weight).nonzero().tolist():
            at = tuple(p if gate.score.shape[d] > 1 else 0 for d, p in enumerate(place))
            s = gate.score[at].item()
            sigma = 1 / (1 + math.exp(-s))
            if gate.grace[at] > 0:
                spared += 1
                continue
            total += gate.price * sigma
            expected[at] += gate.price * sigma * (1 - sigma)
        torch.testing.assert_close(gate.score.grad, expected, rtol=1e-4, atol=1e-6)
    assert spared > 0
    assert compute_penalty(net).item() == pytest.approx(total, rel=1e-5)


def test_the_penalty_counts_weights_whatever_the_grain() -> None:
    """One net that is gated alike at every grain: without a logits layer among the gated ones."""
    values = []
    for grain in GRAINS:
        net, _ = gated_network(grain, 0.0)
        for path, gate in found(net).items():
            gate.price = 0.0 if path == "6.2" else 1.0
        values.append(compute_penalty(net).item())
    assert values == pytest.approx([(4 * 27 + 6 * 36) * 0.5] * len(GRAINS))


def test_grace_ends_with_age() -> None:
    net, _ = gated_network("kernel")
    gate = found(net)["0"]
    gate.grace[0], gate.grace[1] = 2, 1
    seen = []
    for _ in range(4):
        seen.append((gate.grace[0, 0].item(), gate.grace[1, 0].item(), gate.grace[2, 0].item()))
        gates.advance_grace(net)
    assert seen == [(2, 1, 0), (1, 0, 0), (0, 0, 0), (0, 0, 0)]
    assert all(not gate.grace.any() for gate in found(net).values())


@every_grain
def test_frozen_gates_rest_and_their_weights_go_on_learning(grain: Grain) -> None:
    net, _ = gated_network(grain)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)

    def step() -> None:
        optimizer.zero_grad()
        (F.cross_entropy(net(X), torch.arange(4)) + 1e-3 * compute_penalty(net)).backward()
        optimizer.step()

    step()
    gates.freeze_gates(net)
    before = {path: gate.score.detach().clone() for path, gate in found(net).items()}
    weights = net[0].weight.detach().clone()
    for _ in range(3):
        step()
    for path, gate in found(net).items():
        assert torch.equal(gate.score, before[path])
    moved = net[0].weight != weights
    assert moved.any() and not moved[(before["0"] <= 0).expand_as(moved)].any()


# --- shift: a threshold for all gates ------------------------------------------------------------------


@every_grain
@given(seed=st.integers(0, 1000), share=st.floats(0.02, 0.98), drift=st.floats(-3, 3))
@settings(max_examples=10)
def test_settling_keeps_the_highest_scores_up_to_the_count(
    grain: Grain, seed: int, share: float, drift: float
) -> None:
    net, _ = gated_network(grain)
    scatter(net, seed=seed)
    for gate in found(net).values():
        gate.score.data += drift
    rows = []  # (score, weights behind it, path, position)
    step = BLOCK if grain == "block" else 1  # of a layer's outputs that are ranked
    for path, layer, gate in gates.iterate_gates(net):
        score = gate.score.detach()
        if grain == "block":  # of all outputs, these layers have so few
            score = score.mean(0, keepdim=True)
        size = original(layer, "weight").numel() // score.numel()
        rows += [(s, size, path, i) for i, s in enumerate(score.flatten().tolist())]
    total = sum(size for _, size, _, _ in rows)
    best = {max((r for r in rows if r[2] == path), key=lambda r: (r[0], -r[3])) for path in found(net)}
    rows.sort(key=lambda r: (r not in best, -r[0], r[2], r[3]))  # the best of each layer stays
    asked = max(int(share * total), sum(size for _, size, _, _ in best))
    kept, left = set(), asked
    for _, size, path, i in rows:
        if size > left:
            break
        kept.add((path, i))
        left -= size

    keep_best_gates(net, asked)
    now = {
        (p, i) for p, mask in masks(net).items() for i in mask[::step].flatten().nonzero().flatten().tolist()
    }
    assert now == kept
    assert gates.count_open(net) == asked - left
    if grain == "weight":
        assert left == 0


def test_settling_keeps_the_sides_apart_and_the_rest_as_it_is() -> None:
    net, _ = gated_network("weight")
    before = {path: gate.score.detach().clone() for path, gate in found(net).items()}
    keep_best_gates(net, 100)
    for path, gate in found(net).items():
        assert (gate.score.abs() > 0).all()
        same_side = (before[path].abs() > 0.1) & ((before[path] > 0) == (gate.score > 0))
        assert torch.equal(gate.score[same_side], before[path][same_side])


@every_grain
def test_settling_to_all_weights_opens_all_gates(grain: Grain) -> None:
    net, _ = gated_network(grain)
    total = sum(original(layer, "weight").numel() for _, layer, _ in gates.iterate_gates(net))
    keep_best_gates(net, total)
    assert gates.count_open(net) == total


@pytest.mark.parametrize("asked", [0, 8], ids=["nothing", "less than one kernel"])
def test_settling_keeps_one_gate_where_not_even_that_fits(asked: int) -> None:
    net = nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 6, 3), head(6))
    widths = discover(net, X)
    gates.attach_gates(net, widths, "kernel")
    scatter(net)
    for path, gate in found(net).items():  # the logits' kernels are of one weight: let them be the lowest
        gate.score.data += -10 if path == "3.2" else 10
    keep_best_gates(net, asked)
    assert gates.count_open(net) == 9 + 9 + 1  # the strongest kernel of each layer


@pytest.mark.parametrize("asked", [1, 100, 200])
def test_settling_does_not_lose_gates_of_equal_score(asked: int) -> None:
    """Gates that nothing has moved yet all stand at START, and so do those of fresh channels."""
    net, _ = gated_network("weight")
    for gate in found(net).values():
        gate.score.data.fill_(START)
    keep_best_gates(net, asked)
    assert gates.count_open(net) == max(asked, 3), "one for each layer at least"


# --- fold, copies, states -------------------------------------------------------------------------------


@every_grain
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fold_gives_the_plain_model(grain: Grain, training: bool) -> None:
    net, _ = gated_network(grain)
    net.train(training)
    before = states(net)
    plain = fold_gates(net)
    assert not differences(before, states(net))
    assert not any(parametrize.is_parametrized(module) for module in plain.modules())
    assert not any(gates.iterate_gates(plain))
    stock = network()
    assert list(plain.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert repr(plain) == repr(stock)
    assert [type(m) for m in plain.modules()] == [type(m) for m in stock.modules()]
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf for p in plain.parameters())
    assert plain.training == training
    assert torch.equal(plain(X), copy.deepcopy(net)(X))
    stock.load_state_dict(plain.state_dict())


@every_grain
def test_the_gated_original_goes_on_after_a_fold(grain: Grain) -> None:
    """torch's own removal strips the class that all copies share."""
    net, widths = gated_network(grain)
    net.eval()
    expected, twin = net(X).detach(), copy.deepcopy(net)
    plain = fold_gates(net)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(net(X), expected) and torch.equal(twin(X), expected)
    net(X).sum().backward()
    assert all(gate.score.grad is not None for gate in found(net).values())
    assert torch.equal(fold_gates(twin)(X), expected)
    reindex(net, widths, {"3": [0, 1]})
    assert fold_gates(net)(X).shape == net(X).shape


def test_fold_keeps_what_is_frozen_frozen() -> None:
    net, _ = gated_network("weight")
    original(net[0], "weight").requires_grad_(False)
    plain: Any = fold_gates(net)
    assert not plain[0].weight.requires_grad and plain[3].weight.requires_grad


@every_grain
def test_a_copy_lives_its_own_life(grain: Grain) -> None:
    net, _ = gated_network(grain)
    net.eval()
    twin = copy.deepcopy(net)
    expected = net(X).detach()
    assert torch.equal(twin(X), expected)
    for gate in found(twin).values():
        gate.score.data.fill_(-1)
        gate.grace.fill_(5)
    assert gates.count_open(twin) == 0 and not torch.equal(twin(X), expected)
    assert torch.equal(net(X), expected)
    assert all(not gate.grace.any() for gate in found(net).values())


@every_grain
def test_states_travel_without_pickled_code(grain: Grain) -> None:
    net, _ = gated_network(grain)
    for gate in found(net).values():
        gate.grace.fill_(2)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = network()
    gates.attach_gates(other, discover(other, X), grain)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(X), net.eval()(X))
    assert all(gate.grace.eq(2).all() for gate in found(other).values())


# --- surgery on gated models ------------------------------------------------------------------------------


def picked(old: Tensor, dims: dict[int, list[int]], fill: float | None) -> Tensor:
    """An index by hand, entry by entry; None fills with the mean along the axis."""
    new = old
    for dim, index in dims.items():
        rows = []
        for i in index:
            fresh = new.mean(dim) if fill is None else torch.full_like(new.select(dim, 0), fill)
            rows.append(fresh if i == FRESH else new.select(dim, i))
        new = torch.stack(rows, dim)
    return new


@every_grain
def test_scores_grace_and_their_optimizer_state_follow_the_index(grain: Grain) -> None:
    net, widths = gated_network(grain, grace=3)
    for gate in found(net).values():
        gate.grace.copy_(torch.randint(0, 3, gate.grace.shape))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(X), torch.arange(4)).backward()
        optimizer.step()
    twin = copy.deepcopy(net)
    held = {path: copy.deepcopy(optimizer.state[gate.score]) for path, gate in found(net).items()}
    objects = {path: gate.score for path, gate in found(net).items()}

    index = {"0": [2, FRESH, 0], "3": [5, 4, FRESH, 1, FRESH, FRESH, 0]}
    reindex(net, widths, index, optimizers=[optimizer])
    along = {"0": {0: index["0"]}, "3": {0: index["3"], 1: index["0"]}, "6.2": {1: index["3"]}}
    for path, gate in found(net).items():
        dims = {d: i for d, i in along[path].items() if d in gate.dims}
        old, state = found(twin)[path], optimizer.state[gate.score]
        assert gate.score is objects[path]
        assert torch.equal(gate.score, picked(old.score.detach(), dims, START))
        assert torch.equal(gate.grace, picked(old.grace, dims, 3.0))
        assert torch.equal(state["exp_avg"], picked(held[path]["exp_avg"], dims, 0.0))
        torch.testing.assert_close(state["exp_avg_sq"], picked(held[path]["exp_avg_sq"], dims, None))
        assert state["step"] == 2
    optimizer.zero_grad()
    F.cross_entropy(net(X), torch.arange(4)).backward()
    optimizer.step()


@pytest.mark.sampled(10)
@every_case_and_grain
def test_growth_keeps_the_function_of_a_gated_model(case: Case, grain: Grain) -> None:
    if case.mixed:
        pytest.skip("a norm over channels feels fresh ones")
    net, x = case.model(), case.example()
    widths = discover(net, x)
    gates.attach_gates(net, widths, grain, grace=2)
    scatter(net)
    for gate in found(net).values():
        gate.score.data += 0.5
    with torch.no_grad():
        expected = [copy.deepcopy(net).train(training)(x) for training in (True, False)]
        reindex(net, widths, {name: grow_index(width.size, 2) for name, width in widths.items()})
        for training, y in zip((True, False), expected, strict=True):
            torch.testing.assert_close(copy.deepcopy(net).train(training)(x), y, rtol=1e-5, atol=1e-5)
    assert any((gate.grace == 2).any() for gate in found(net).values())


@every_grain
def test_pruned_channels_leave_and_fresh_ones_come(grain: Grain) -> None:
    net, widths = gated_network(grain, 0.0, grace=2)
    for gate in found(net).values():
        gate.score.data.fill_(0.5)
    nn.init.zeros_(original(net[1], "bias"))
    net[1].running_mean.zero_()
    found(net)["0"].score.data[[1, 3]] = -1  # what writes them; the norm keeps them at zero
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        (F.cross_entropy(net(X), torch.arange(4)) + 1e-3 * compute_penalty(net)).backward()
        optimizer.step()

    keep = find_removable_channels(net, widths, X)
    assert {name: index.tolist() for name, index in keep.items()} == {"0": [0, 2]}
    expected = copy.deepcopy(net).eval()(X)
    reindex(net, widths, keep, optimizers=[optimizer])
    torch.testing.assert_close(copy.deepcopy(net).eval()(X), expected)
    step()
    expected = copy.deepcopy(net).eval()(X)
    reindex(net, widths, {"0": grow_index(2, 2)}, optimizers=[optimizer])
    torch.testing.assert_close(copy.deepcopy(net).eval()(X), expected)
    gate = found(net)["0"]
    assert gate.score[2:].eq(START).all() and gate.grace[2:].eq(2).all() and not gate.grace[:2].any()
    assert find_removable_channels(net, widths, X) == {}, "fresh channels are read by zeros, and stay"
    before = gate.score.detach().clone()
    step()
    assert not torch.equal(gate.score, before)


def test_what_is_opened_again_had_the_highest_scores() -> None:
    net, _ = gated_network("weight")
    held = [gate for _, _, gate in gates.iterate_gates(net)]
    for gate in held:
        gate.score.data = -torch.rand(
            gate.score.shape, generator=torch.Generator().manual_seed(len(gate.score))
        )
    before = [gate.score.detach().clone() for gate in held]
    reopen_gates(net, 40)
    was = torch.cat([score.flatten() for score in before])
    now = torch.cat([gate.score.detach().flatten() for gate in held])
    opened = now > 0
    assert all((gate.score > 0).any() for gate in held), "of every layer one"
    assert opened.sum() == 40 and (now[opened] == REOPENED).all() and torch.equal(now[~opened], was[~opened])
    best = torch.stack([score.max() for score in before])
    rest = was[opened & ~torch.isin(was, best)]
    assert rest.min() > was[~opened].max()


def test_what_is_open_stays_as_it_is() -> None:
    net, _ = gated_network("weight")
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data = torch.linspace(-1, 1, gate.score.numel()).view(gate.score.shape)
    before = [gate.score.detach().clone() for _, _, gate in gates.iterate_gates(net)]
    reopen_gates(net, gates.count_open(net))
    reopen_gates(net, 0)
    assert all(
        torch.equal(s, gate.score) for s, (_, _, gate) in zip(before, gates.iterate_gates(net), strict=True)
    )


# --- blocks -----------------------------------------------------------------------------------------------


def train_blocks(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Train with a penalty, and check after each step that all gates of a block are the same."""
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(X), torch.arange(4)).backward()
        add_penalty_gradient(gates.iterate_gates(net), 1e-4)
        for gate in found(net).values():
            assert gate.score.grad is not None and gate.block is not None
            expected = gates.average_blocks(gate.score.grad, gate.block, gate.channel)
            assert torch.equal(gate.score.grad, expected)
        optimizer.step()
        for gate in found(net).values():
            assert torch.equal(gate.score, gates.average_score(gate))


@given(data=st.data())
@settings(max_examples=4)
def test_a_block_is_one_gate_whatever_becomes_of_its_outputs(data: st.DataObject) -> None:
    """Outputs leave, are sorted anew and come; a step moves all gates of a block alike."""
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), conv(20, 11, 3), nn.ReLU(), head(11))
    widths = discover(net, X)
    gates.attach_gates(net, widths, "block", grace=1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.3, weight_decay=0.0)
    for change in data.draw(st.lists(st.sampled_from(["leave", "sort", "come"]), min_size=1, max_size=3)):
        train_blocks(net, optimizer)
        name, size = data.draw(st.sampled_from(list(widths.sizes().items())))
        order = data.draw(st.permutations(range(size)))
        index = {"leave": sorted(order[size // 3 :]), "sort": order, "come": grow_index(size, 11)}[change]
        y = copy.deepcopy(net).eval()(X)
        reindex(net, widths, {name: index}, optimizers=[optimizer])
        gates.form_blocks(net)
        if change != "leave":
            torch.testing.assert_close(copy.deepcopy(net).eval()(X), y, rtol=1e-4, atol=1e-5)
    train_blocks(net, optimizer)
    for gate in found(net).values():
        assert (
            gate.block is not None
            and gate.block.min() >= 0
            and gate.block.unique(return_counts=True)[1].max() <= BLOCK
        )
    assert any(0 < int((gate.score > 0).sum()) < gate.score.numel() for gate in found(net).values())


@torch.inference_mode()
def test_torchs_counter_of_operations_counts_a_gated_network() -> None:
    counts = []
    for net in (network(), gated_network("kernel")[0]):
        with FlopCounterMode(display=False) as counter:
            net(X)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
