"""Re-indexing against what a channel-wise gather by hand gives, and against the function it must keep."""

import copy
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from elastic.errors import StructureError
from elastic.surgery.fresh import Patch, random, split, zero_out
from elastic.surgery.indices import pair_index
from elastic.surgery.reindexing import FRESH, grow_index, reindex, resize_index
from elastic.widths.discovery import discover
from elastic.widths.parameters import find_weight_norm, get_original
from elastic.widths.width import Widths
from tests.elastic.zoo import CASES, STORED, Case, Net, changes, conv, differences, head, states

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
unmixed_case = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if not c.mixed], ids=[n for n, c in CASES.items() if not c.mixed]
)
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


def two_layers() -> nn.Sequential:
    """One width, "0": written by "0", carried by "1", read by "5"."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    )


def trained(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(x), torch.arange(8) % 5).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


# --- the function is kept ----------------------------------------------------------------------------


@pytest.mark.sampled(22)
@unmixed_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_growth_keeps_the_function(case: Case, training: bool) -> None:
    model, x = case.model().train(training), case.example()
    widths = discover(model, x)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        for name, width in widths.items():
            reindex(model, widths, {name: grow_index(width.size, 3)})
            close(copy.deepcopy(model)(x), expected)
        reindex(model, widths, {name: grow_index(width.size, 2) for name, width in widths.items()})
        close(copy.deepcopy(model)(x), expected)


@unmixed_case
def test_fresh_channels_may_stand_anywhere(case: Case) -> None:
    model, x = case.model().eval(), case.example()
    widths = discover(model, x)
    expected = model(x).detach()
    reindex(model, widths, {n: [FRESH, *range(w.size - 1), FRESH, w.size - 1] for n, w in widths.items()})
    close(model(x), expected)


@every_case
def test_order_does_not_matter_to_the_function(case: Case) -> None:
    model, x = case.model().eval(), case.example()
    widths = discover(model, x)
    expected, drawn = model(x).detach(), torch.Generator().manual_seed(0)
    reindex(model, widths, {n: torch.randperm(w.size, generator=drawn) for n, w in widths.items()})
    close(model(x), expected)


@pytest.mark.sampled(33)
@unmixed_case
@pytest.mark.parametrize("fresh", [zero_out, split])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_split_keeps_the_function(case: Case, fresh: Callable[..., Tensor], training: bool) -> None:
    model, x = case.model().train(training), case.example()
    widths = discover(model, x)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        index = {n: [*range(w.size), 0, w.size - 1, 0] for n, w in widths.items()}
        reindex(model, widths, index, fresh=fresh)
        close(model(x), expected)


@every_case
def test_splitting_every_channel_evenly_keeps_even_a_mixed_function(case: Case) -> None:
    """A norm's mean and variance over channels do not feel that each comes twice."""
    model, x = case.model().eval(), case.example()
    widths = discover(model, x)
    expected = model(x).detach()
    reindex(
        model, widths, {n: torch.arange(w.size).repeat_interleave(2) for n, w in widths.items()}, fresh=split
    )
    close(model(x), expected)


def test_noise_parts_the_readers_of_a_split_channel() -> None:
    model = two_layers()
    widths = discover(model, X)
    reindex(model, widths, {"0": [0, 1, 2, 3, 1]}, fresh=split)
    assert torch.equal(model[0].weight[1], model[0].weight[4])
    assert not torch.equal(model[5].weight[:, 1], model[5].weight[:, 4])


@unmixed_case
def test_a_channel_that_nothing_reads_can_go(case: Case) -> None:
    model, x = case.model().eval(), case.example()
    widths = discover(model, x)
    gone = {name: [0] if width.size > 1 else [] for name, width in widths.items()}
    with torch.no_grad():
        for name, width in widths.items():
            for slot in width.slots_with("in"):
                layer, positions = model.get_submodule(slot.module), widths.positions(slot, name)
                norm = find_weight_norm(layer, slot.tensor)
                is_normed = norm is not None and norm.dim == slot.dim  # a direction of zeros has no norm
                weight: Any = norm.norms if is_normed else get_original(layer, slot.tensor)
                weight.index_fill_(slot.dim, positions[gone[name]].flatten(), 0)
    expected = model(x).detach()
    reindex(model, widths, {n: [c for c in range(w.size) if c not in gone[n]] for n, w in widths.items()})
    close(model(x), expected)


def test_group_and_layer_norm_are_marked_because_growth_is_felt() -> None:
    for case in (CASES["group_norm_of_groups"], CASES["layer_norm"]):
        model, x = case.model().eval(), case.example()
        widths = discover(model, x)
        (name,) = case.mixed
        assert "\n" not in str(widths[name].mixed) and "normalises over its channels" in str(
            widths[name].mixed
        )
        expected = model(x).detach()
        reindex(model, widths, {name: grow_index(widths[name].size, 2)})
        assert not torch.allclose(model(x), expected, rtol=1e-3)


# --- indices compose ---------------------------------------------------------------------------------


@pytest.mark.sampled(10)
@pytest.mark.parametrize("case", STORED.values(), ids=STORED)
def test_growing_and_pruning_back_changes_no_bit(case: Case) -> None:
    model, x = case.model(), case.example()
    widths = discover(model, x)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, amsgrad=True)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before, sizes = states(model, optimizer), widths.sizes()
    reindex(model, widths, {n: grow_index(s, 2) for n, s in sizes.items()}, optimizers=[optimizer])
    assert differences(before, states(model, optimizer))
    reindex(model, widths, {n: range(s) for n, s in sizes.items()}, optimizers=[optimizer])
    assert not differences(before, states(model, optimizer))
    assert widths.sizes() == sizes


@pytest.mark.sampled(10)
@every_case
@given(data=st.data())
@settings(max_examples=2)
def test_one_index_after_another_is_their_composition(case: Case, data: st.DataObject) -> None:
    """For channels that are kept: pruning and ordering."""
    once, x = case.model(), case.example()
    twice = copy.deepcopy(once)
    widths, its = discover(once, x), discover(twice, x)
    first = {n: data.draw(st.permutations(range(w.size))) for n, w in widths.items()}
    first = {n: index[: data.draw(st.integers(1, len(index)))] for n, index in first.items()}
    second = {n: data.draw(st.permutations(range(len(index)))) for n, index in first.items()}
    reindex(once, widths, {n: [first[n][i] for i in second[n]] for n in first})
    for name, index in first.items():
        reindex(twice, its, {name: index})
    reindex(twice, its, second)
    assert its == widths
    for (name, a), b in zip(once.state_dict().items(), twice.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_identity_changes_nothing() -> None:
    model = two_layers()
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer)
    widths = discover(model, X)
    before = states(model, optimizer)
    reindex(model, widths, {"0": [0, 1, 2, 3]}, optimizers=[optimizer])
    reindex(model, widths, {}, optimizers=[optimizer])
    assert not differences(before, states(model, optimizer))


def test_indices_of_growth_and_of_size() -> None:
    assert grow_index(3, 2).tolist() == [0, 1, 2, FRESH, FRESH]
    assert grow_index(3, 0).tolist() == [0, 1, 2]
    assert resize_index(3, 2).tolist() == [0, 1]
    assert resize_index(3, 5).tolist() == [0, 1, 2, FRESH, FRESH]


# --- by hand, on two layers --------------------------------------------------------------------------

INDEX = [2, FRESH, 0, 0, FRESH]
KEPT = [0, 2, 3]  # new places of old channels
OLD = [2, 0, 0]
NEW = [1, 4]


def test_parameters_and_buffers_follow_the_index() -> None:
    model = two_layers()
    trained(model)
    old = copy.deepcopy(model.state_dict())
    widths = discover(model, X)
    reindex(model, widths, {"0": INDEX})
    new = model.state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert len(new[name]) == 5
        assert torch.equal(new[name][KEPT], old[name][OLD]), name
    assert torch.equal(new["5.weight"][:, KEPT], old["5.weight"][:, OLD] / torch.tensor([1.0, 2.0, 2.0]))
    for name in ("1.num_batches_tracked", "5.bias"):
        assert torch.equal(new[name], old[name])
    # fresh channels: neutral norms, no bias, no reader
    neutral = {"0.bias": 0, "1.weight": 1, "1.bias": 0, "1.running_mean": 0, "1.running_var": 1}
    for name, value in neutral.items():
        assert torch.equal(new[name][NEW], torch.full((2,), float(value))), name
    assert not new["5.weight"][:, NEW].any()
    assert new["0.weight"][NEW].std() == pytest.approx((2 / 27) ** 0.5, rel=0.3)  # He et al.


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, 1e-2),
        lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
        lambda p: torch.optim.NAdam(p, 1e-2),
        lambda p: torch.optim.RAdam(p, 1e-2),
        lambda p: torch.optim.Adamax(p, 1e-2),
        lambda p: torch.optim.Adagrad(p, 1e-2),
        lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, 1e-2, centered=True),
        lambda p: torch.optim.Rprop(p, 1e-2),
    ],
    ids=[
        "sgd",
        "adam",
        "amsgrad",
        "adamw",
        "nadam",
        "radam",
        "adamax",
        "adagrad",
        "rmsprop",
        "rmsprop_centered",
        "rprop",
    ],
)
def test_optimizer_state_follows_the_index(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    scales = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "step_size"}
    model = two_layers()
    optimizer = make(model.parameters())
    trained(model, optimizer)
    widths = discover(model, X)
    objects = list(map(id, model.parameters()))
    groups = [(id(group["params"]), list(map(id, group["params"]))) for group in optimizer.param_groups]
    dims = {"0.weight": 0, "0.bias": 0, "1.weight": 0, "1.bias": 0, "5.weight": 1}
    old = {
        name: {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
    }
    reindex(model, widths, {"0": INDEX}, optimizers=[optimizer])

    assert list(map(id, model.parameters())) == objects
    assert [(id(g["params"]), list(map(id, g["params"]))) for g in optimizer.param_groups] == groups
    seen = 0
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            before = old[name][key]
            if not isinstance(value, Tensor) or value.dim() == 0 or name not in dims:
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(before)), (name, key)
                continue
            seen += 1
            assert value.shape == parameter.shape
            now, then = value.movedim(dims[name], 0), before.movedim(dims[name], 0)
            assert torch.equal(now[KEPT], then[OLD]), (name, key)
            filled = then.mean(0) if key in scales else torch.zeros_like(then[0])
            torch.testing.assert_close(now[NEW], torch.stack([filled, filled]), rtol=1e-6, atol=0)
    assert seen >= len(dims)
    trained(model, optimizer)
    assert all(p.isfinite().all() for p in model.parameters())


def test_what_adafactor_keeps_of_rows_and_columns_follows_the_index() -> None:
    model = two_layers()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    trained(model, optimizer)
    weights = model[0].weight, model[5].weight  # type: ignore[union-attr]
    old = [{key: value.clone() for key, value in optimizer.state[weight].items()} for weight in weights]
    reindex(model, discover(model, X), {"0": INDEX}, optimizers=[optimizer])
    moved = [(0, "row_var", 0), (0, "col_var", 0), (1, "col_var", 1)]
    for layer, key, dim in moved:
        now, then = (s[key].movedim(dim, 0) for s in (optimizer.state[weights[layer]], old[layer]))
        assert torch.equal(now[KEPT], then[OLD]), (layer, key)
        assert now[NEW].gt(0).all(), (layer, key)
    assert torch.equal(optimizer.state[weights[1]]["row_var"], old[1]["row_var"])
    trained(model, optimizer)
    assert all(p.isfinite().all() for p in model.parameters())


def test_what_an_optimizer_keeps_by_other_names_follows_by_its_kind() -> None:
    """Weights as they were (MADGRAD, Lookahead), what steps are scaled by (AdaBelief, Adan), or moments."""
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weight: Any = model[0].weight
    then = {
        "x0": weight.detach() + 0.01 * torch.randn_like(weight),
        "belief": torch.rand_like(weight),
        "drift": torch.randn_like(weight),
        "norm": torch.ones(1),
        "sign": torch.ones_like(weight, dtype=torch.int8),
    }
    optimizer.state[weight] = {key: value.clone() for key, value in then.items()}
    reindex(model, discover(model, X), {"0": INDEX}, optimizers=[optimizer])
    now = optimizer.state[weight]
    assert all(torch.equal(now[key][KEPT], then[key][OLD]) for key in ("x0", "belief", "drift", "sign"))
    assert torch.equal(now["x0"][NEW], weight.detach()[NEW])
    torch.testing.assert_close(now["belief"][NEW], then["belief"].mean(0, keepdim=True).expand(2, -1, -1, -1))
    assert not now["drift"][NEW].any()
    assert not now["sign"][NEW].any()
    assert torch.equal(now["norm"], then["norm"])


def test_what_an_optimizer_keeps_in_other_shapes_follows() -> None:
    """Flat (Prodigy), an entry for each row or column (other Adafactors, SM3), or in a list (AggMo)."""
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weight: Any = model[0].weight
    rows, columns = torch.rand(4, 3, 3), torch.rand(4, 3, 3)
    state = {
        "p0": weight.detach().flatten().clone(),
        "sq_row": rows.clone(),
        "sq_col": columns.clone(),
        "cover": torch.arange(4.0).view(4, 1, 1, 1),
        "momentum_buffer": [torch.ones_like(weight), torch.ones_like(weight)],
    }
    optimizer.state[weight] = dict(state)
    last: Any = model[5].weight
    optimizer.state[last] = {"row_moment": torch.randn_like(last)}  # a name alone says nothing
    reindex(model, discover(model, X), {"0": INDEX}, optimizers=[optimizer])
    now = optimizer.state[weight]
    assert torch.equal(now["p0"], weight.detach().flatten())
    for key, then in (("sq_row", rows), ("sq_col", columns), ("cover", state["cover"])):
        assert torch.equal(now[key][KEPT], then[OLD]), key  # type: ignore[index]
        assert now[key].shape == (len(INDEX), *then.shape[1:]), key  # type: ignore[union-attr]
    assert optimizer.state[last]["row_moment"].shape == last.shape
    assert all(buffer[KEPT].all() and not buffer[NEW].any() for buffer in now["momentum_buffer"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("make", "most"), [(torch.optim.Adam, 1), (torch.optim.AdamW, 1), (torch.optim.RMSprop, 3)]
)
def test_the_first_step_after_growth_is_of_ordinary_size(make: Any, most: float) -> None:
    """Second moments of zero would let fresh readers step 1.6 (Adam) or 10 (RMSprop) times the rate here."""
    rate = 1e-3
    model = two_layers()
    optimizer = make(model.parameters(), rate)
    trained(model, optimizer, steps=300)
    widths = discover(model, X)
    reindex(model, widths, {"0": grow_index(4, 4)}, optimizers=[optimizer])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model, optimizer, steps=1)
    for name, parameter in model.named_parameters():
        step = (parameter.detach() - before[name]).abs().max()
        assert 0 < step <= most * rate, name


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_that_has_not_stepped_yet(make: Any) -> None:
    model = two_layers()
    optimizer = make(model.parameters(), 1e-2)
    widths = discover(model, X)
    reindex(model, widths, {"0": grow_index(4, 2)}, optimizers=[optimizer])
    trained(model, optimizer)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_scheduler_made_before_still_drives_the_optimizer() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    trained(model, optimizer, steps=1)
    scheduler.step()
    reindex(model, discover(model, X), {"0": grow_index(4, 2)}, optimizers=[optimizer])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    for state in optimizer.state.values():
        state["momentum_buffer"].zero_()
    before = model[0].weight.detach().clone()
    F.cross_entropy(model(X), torch.arange(4)).backward()
    optimizer.step()
    torch.testing.assert_close(before - model[0].weight.detach(), 0.25 * model[0].weight.grad)


def test_several_optimizers_and_an_outsider_follow() -> None:
    model = two_layers()
    body = torch.optim.Adam(model[:2].parameters())
    last = torch.optim.SGD(model[5].parameters(), 0.1, momentum=0.9)
    trained(model, body, last)
    reindex(model, discover(model, X), {"0": [1, 3]}, optimizers=[body, last])
    assert body.state[model[0].weight]["exp_avg"].shape == (2, 3, 3, 3)
    assert last.state[model[5].weight]["momentum_buffer"].shape == (5, 2)
    trained(model, body, last)


# --- refusals leave everything as it was --------------------------------------------------------------


def refused(
    match: str,
    model: nn.Module,
    widths: Widths,
    wanted: Mapping[str, Any],
    *optimizers: torch.optim.Optimizer,
) -> None:
    before, sizes = states(model, *optimizers), widths.sizes()
    with pytest.raises(StructureError, match=match) as error:
        reindex(model, widths, wanted, optimizers=optimizers)
    assert "\n" not in str(error.value)
    assert not differences(before, states(model, *optimizers))
    assert widths.sizes() == sizes


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ({"0": [0, 4]}, r"'0' has channels 0 … 3"),
        ({"0": [0, -2]}, r"'0' has channels 0 … 3"),
        ({"0": []}, "at least one channel"),
        ({"0": torch.empty(0, dtype=torch.long)}, "at least one channel"),
        ({"0": 3}, "'0'"),
        ({"0": [[0, 1]]}, "'0'"),
        ({"0": torch.tensor([True, False, True, True])}, "'0'"),  # a mask is no index
        ({"0": [0.0, 1.5]}, "'0'"),
        ({"5": [0]}, "it is the model's output"),
        ({"0": [0], "stem": [0]}, "'stem' cannot change: there is none"),
    ],
)
def test_a_wrong_index_is_refused(wanted: Mapping[str, Any], match: str) -> None:
    model = two_layers()
    refused(match, model, discover(model, X), wanted)


@pytest.mark.parametrize(
    "basis", [torch.eye(3), [torch.eye(3), torch.eye(4)], SimpleNamespace(rows=torch.eye(3)), [None]]
)
def test_state_of_another_shape_is_refused(basis: Any) -> None:
    """As of a basis for rows, and one for columns (SOAP, Shampoo), or within something else (GaLore)."""
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trained(model, optimizer)
    optimizer.state[model[0].weight]["basis"] = basis  # type: ignore[union-attr]
    if basis == [None]:
        reindex(model, discover(model, X), {"0": [0, 1]}, optimizers=[optimizer])
    else:
        refused("SGD keeps 'basis'", model, discover(model, X), {"0": [0, 1]}, optimizer)


@pytest.mark.parametrize(
    "wanted", [[0, 2], [0, 1, 2, 3, FRESH], [3, 1, 0, 2]], ids=["prune", "grow", "order"]
)
def test_a_live_graph_is_refused(wanted: list[int]) -> None:
    model = two_layers()
    widths = discover(model, X)
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer)
    y = model(X)
    refused("autograd graph", model, widths, {"0": wanted}, optimizer)
    y.sum().backward()  # the refused change harmed nothing
    del y
    reindex(model, widths, {"0": wanted}, optimizers=[optimizer])
    trained(model, optimizer)


def test_a_refusal_keeps_gradients_that_were_there() -> None:
    model = two_layers()
    widths = discover(model, X)
    trained(model)
    y = model(X)
    refused("autograd graph", model, widths, {"0": [0]})
    assert y.requires_grad and all(p.grad is not None for p in model.parameters())


def test_a_graph_that_is_garbage_is_no_live_graph() -> None:
    """Tracebacks and frames keep outputs in reference cycles until the collector runs."""
    model = two_layers()
    widths = discover(model, X)
    cycle: list[Any] = [model(X)]
    cycle.append(cycle)
    del cycle
    reindex(model, widths, {"0": [0, 1]})


def test_in_inference_mode_a_network_changes_and_a_live_graph_is_refused_as_elsewhere() -> None:
    model = two_layers().eval()
    widths = discover(model, X)
    y = model(X)
    with torch.inference_mode():
        with pytest.raises(StructureError, match="autograd graph"):
            reindex(model, widths, {"0": [1, 0]})
        del y
        expected = model(X)
        for network in (model, copy.deepcopy(model)):  # the copy is made of inference tensors
            reindex(network, copy.deepcopy(widths), {"0": [3, 2, 1, 0, FRESH]})
            close(network(X), expected)


def test_gradients_are_dropped() -> None:
    model = two_layers()
    trained(model)
    reindex(model, discover(model, X), {"0": [0, 1]})
    assert all(
        model.get_parameter(name).grad is None for name in ("0.weight", "0.bias", "1.weight", "5.weight")
    )


class Interrupted(Exception):
    pass


def test_a_failure_half_way_leaves_everything_as_it_was() -> None:
    case = CASES["squeeze_excite"]
    model, x = case.model(), case.example()
    optimizer = torch.optim.Adam(model.parameters())
    averaged = AveragedModel(model)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    widths = discover(model, x)
    wanted = {name: grow_index(size, 2) for name, size in case.sizes.items()}
    before = states(model, optimizer) | {f"copy {k}": v for k, v in states(averaged).items()}
    calls = 0

    def failing(at: int) -> Callable[[Patch, torch.Generator], Tensor]:
        def fresh(patch: Patch, generator: torch.Generator) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Interrupted
            return zero_out(patch, generator)

        return fresh

    reindex(copy.deepcopy(model), copy.deepcopy(widths), wanted, fresh=failing(0))
    weights = calls
    assert weights == 4  # conv, down, up, head
    for at in range(1, weights + 1):
        calls = 0
        with pytest.raises(Interrupted):
            reindex(
                model, widths, wanted, optimizers=[optimizer], copies=[averaged.module], fresh=failing(at)
            )
        assert calls == at
        after = states(model, optimizer) | {f"copy {k}": v for k, v in states(averaged).items()}
        assert not differences(before, after)
        assert widths.sizes() == case.sizes


def test_a_strategy_is_asked_once_a_weight_and_told_whose() -> None:
    model, asked = two_layers(), []

    def fresh(patch: Patch, generator: torch.Generator) -> Tensor:
        asked.append(
            (patch.layer, patch.fresh_out.tolist(), patch.fresh_in.tolist(), patch.in_source.tolist())
        )
        return patch.weight

    reindex(model, discover(model, X), {"0": INDEX}, fresh=fresh)
    new = [old == FRESH for old in INDEX]
    assert asked == [("0", new, [False] * 3, [0, 1, 2]), ("5", [False] * 5, new, INDEX)]


def test_a_copy_of_another_structure_leaves_everything_as_it_was() -> None:
    model, other = two_layers(), nn.Sequential(conv(3, 4))
    widths = discover(model, X)
    before = states(model)
    with pytest.raises((StructureError, AttributeError)):
        reindex(model, widths, {"0": [0]}, copies=[other])
    assert not differences(before, states(model))
    assert widths.sizes() == {"0": 4}


# --- averaged copies ---------------------------------------------------------------------------------


def test_averaged_weights_follow() -> None:
    model = two_layers()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    averaged.update_parameters(model)
    trained(model, torch.optim.SGD(model.parameters(), 0.5))
    averaged.update_parameters(model)
    old, its = copy.deepcopy(averaged.module.state_dict()), list(map(id, averaged.parameters()))
    reindex(model, discover(model, X), {"0": INDEX}, copies=[averaged.module])

    new, now = averaged.module.state_dict(), model.state_dict()
    assert list(map(id, averaged.parameters())) == its
    assert {n: t.shape for n, t in new.items()} == {n: t.shape for n, t in now.items()}
    assert repr(averaged.module) == repr(model)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert torch.equal(new[name][KEPT], old[name][OLD]), name
        assert not torch.equal(new[name][KEPT], now[name][KEPT]), "the copy has values of its own"
        assert torch.equal(new[name][NEW], now[name][NEW]), name
    assert torch.equal(new["5.weight"][:, KEPT], old["5.weight"][:, OLD] / torch.tensor([1.0, 2.0, 2.0]))
    assert torch.equal(new["5.weight"][:, NEW], now["5.weight"][:, NEW])
    averaged.update_parameters(model)
    assert averaged(X).shape == (4, 5)


def test_a_random_start_is_the_same_in_every_copy() -> None:
    case = CASES["projection"]
    model, x = case.model(), case.example()
    twins = [copy.deepcopy(model), copy.deepcopy(model)]
    wanted = {name: grow_index(size, 2) for name, size in case.sizes.items()}
    reindex(model, discover(model, x), wanted, copies=twins, fresh=random)
    for twin in twins:
        for name, tensor in twin.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name


@every_case
def test_pruned_channels_grow_again_alike_in_model_and_copy(case: Case) -> None:
    model, x = case.model(), case.example()
    twin = copy.deepcopy(model)
    widths = discover(model, x)
    for wanted in (
        {name: list(range(size))[1:] or [0] for name, size in case.sizes.items()},
        {name: [FRESH, *range(max(1, size - 1))] for name, size in case.sizes.items()},
    ):
        reindex(model, widths, wanted, copies=[twin])
    for (name, tensor), its in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(tensor, its), name
    assert repr(model) == repr(twin)


# --- what the modules say of themselves ---------------------------------------------------------------


def attributes(module: nn.Module, *names: str) -> list[Any]:
    return [getattr(module, name) for name in names]


def test_convolutions_and_linear_layers_say_their_channels() -> None:
    model = CASES["plain"].model()
    reindex(model, discover(model, X), {"0": [0, 1, 2], "3": grow_index(6, 2)})
    assert attributes(model[0], "in_channels", "out_channels") == [3, 3]
    assert attributes(model[1], "num_features") == [3]
    assert attributes(model[3], "in_channels", "out_channels") == [3, 8]
    assert attributes(model[4][2], "in_features", "out_features") == [8, 5]
    assert "Conv2d(3, 8" in repr(model) and "BatchNorm2d(3" in repr(model) and "in_features=8" in repr(model)


@pytest.mark.parametrize(
    ("case", "wanted", "module", "expected"),
    [
        ("depthwise", {"0": [0, 1]}, "1", dict(in_channels=2, out_channels=2, groups=2)),
        (
            "depthwise_multiplied",
            {"0": grow_index(4, 1)},
            "1",
            dict(in_channels=5, out_channels=10, groups=5),
        ),
        ("depthwise_multiplied", {"0": [2]}, "1", dict(in_channels=1, out_channels=2, groups=1)),
        ("grouped", {"0": [0, 1], "2": [0, 1, FRESH]}, "2", dict(in_channels=4, out_channels=6, groups=2)),
        ("group_norm", {"0": [1], "3": [0, 1]}, "1", dict(num_groups=1, num_channels=3)),
        ("group_norm_of_groups", {"0": [0, 2]}, "1", dict(num_groups=2, num_channels=8)),
        ("group_norm", {"0": [0, 1], "3": [0, 1]}, "4", dict(num_groups=2, num_channels=2)),
        ("layer_norm", {"conv": [0, 1]}, "norm", dict(normalized_shape=(2,))),
        ("instance_norm", {"0": [0, 1]}, "1", dict(num_features=2)),
        ("prelu", {"0": [0, 1, 2]}, "1", dict(num_parameters=3)),
        ("prelu", {"2": [0, 1, 2]}, "3", dict(num_parameters=1)),
        ("flatten", {"0": [0, 1]}, "3", dict(in_features=18, out_features=7)),
        ("flatten", {"3": [0, 1]}, "3", dict(in_features=36, out_features=2)),
        ("chunk", {"conv": [0, 1]}, "conv", dict(in_channels=3, out_channels=4)),
    ],
)
def test_layers_say_what_their_tensors_are(
    case: str, wanted: dict[str, Sequence[int]], module: str, expected: dict[str, Any]
) -> None:
    model, x = CASES[case].model(), CASES[case].example()
    reindex(model, discover(model, x), wanted)
    layer = model.get_submodule(module)
    assert {name: getattr(layer, name) for name in expected} == expected
    assert repr(model)
    model(x)


def test_a_group_norm_grows_again_from_one_group_and_from_one_channel_a_group() -> None:
    model = CASES["group_norm"].model()
    widths = discover(model, X)
    reindex(model, widths, {"0": [0]})
    reindex(model, widths, {"0": grow_index(1, 2)})
    assert attributes(model[1], "num_groups", "num_channels") == [3, 9]
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 6, 1, groups=3), nn.Conv2d(6, 2, 1)
    )
    widths = discover(model, X)
    reindex(model, widths, {"0": [0]})
    reindex(model, widths, {"0": grow_index(1, 2)})
    assert attributes(model[1], "num_groups", "num_channels") == [3, 9]


@pytest.mark.sampled(10)
@every_case
@given(data=st.data())
@settings(max_examples=2)
def test_attributes_are_those_of_a_layer_built_so(case: Case, data: st.DataObject) -> None:
    model, x = case.model(), case.example()
    widths = discover(model, x)
    reindex(model, widths, data.draw(changes(widths, case.smallest)))
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            written, read = module.out_channels, module.in_channels // module.groups
            shape = (read * module.groups, written // module.groups) if module.transposed else (written, read)
            assert tuple(module.weight.shape[:2]) == shape
            assert module.bias is None or len(module.bias) == written
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
            assert len(module.weight) == len(module.running_mean) == module.num_features


class OwnNorm(nn.Module):
    """A norm of one's own, whose gain, of shape (1, C, 1, 1), is called a weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean((0, 2, 3), keepdim=True).sqrt() * self.weight


@pytest.mark.parametrize("fresh", [zero_out, split, random])
def test_fresh_channels_have_a_gain_that_lets_them_learn(fresh: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), OwnNorm(4), nn.ReLU(), head(4))
    widths, gain = discover(model, X), model[1].weight.detach().clone()
    reindex(model, widths, {"0": grow_index(4, 2)}, fresh=fresh)
    assert torch.equal(model[1].weight, torch.cat([gain, gain.mean(1, keepdim=True).expand(-1, 2, 1, 1)], 1))
    model(X).square().sum().backward()
    assert fresh is random or model[3][2].weight.grad[:, 4:].abs().min() > 0


class LocallyConnected(nn.Module):
    """A weight for each place; its channels lie on no dimension that a convolution's do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, 5, channels, 4, 4, 9))

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2)
        return (windows.unsqueeze(1) * self.weight).sum((2, -1))


def test_channels_may_lie_on_any_dimension_of_a_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), LocallyConnected(4), head(5))
    widths, expected = discover(model, X), model(X).detach()
    reindex(model, widths, {"0": [2, 0, 3, 1]}, fresh=random)
    close(model(X), expected)


def test_memory_format_is_kept_in_weights_and_optimizer() -> None:
    model = two_layers().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer)
    for index in ([0, 2], grow_index(2, 3)):
        reindex(model, discover(model, X), {"0": index}, optimizers=[optimizer])
        for tensor in (model[0].weight, optimizer.state[model[0].weight]["exp_avg"]):
            assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    plain = two_layers()
    reindex(plain, discover(plain, X), {"0": [0, 2]})
    assert plain[0].weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_type_is_kept(dtype: torch.dtype) -> None:
    model = two_layers().to(dtype)
    reindex(model, discover(model, X.to(dtype)), {"0": INDEX}, fresh=split)
    assert {t.dtype for t in model.state_dict().values()} == {dtype, torch.int64}


def test_frozen_parameters_stay_frozen() -> None:
    model = two_layers()
    model[0].requires_grad_(False)
    reindex(model, discover(model, X), {"0": INDEX})
    assert not model[0].weight.requires_grad and model[5].weight.requires_grad


# --- randomness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [zero_out, random, split])
def test_same_seed_same_result(fresh: Callable[..., Tensor]) -> None:
    results = []
    for seed in (1, 1, 2, None, None):
        model = two_layers()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        reindex(model, discover(model, X), {"0": INDEX}, fresh=fresh, generator=generator)
        results.append(model[0].weight.detach())
    one, same, other, default, again = results
    assert torch.equal(one, same) and torch.equal(default, again)
    assert not torch.equal(one, other)


def test_the_global_generator_is_left_alone() -> None:
    model = two_layers()
    widths = discover(model, X)
    before = torch.get_rng_state()
    reindex(model, widths, {"0": INDEX}, fresh=split)
    assert torch.equal(before, torch.get_rng_state())


def test_training_goes_on_after_every_change() -> None:
    """Growth, pruning and order between steps: the loss of a tiny task still falls."""
    model = two_layers()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    widths = discover(model, X)
    target = torch.arange(4)
    losses = []
    for step in range(60):
        if step % 10 == 5:
            size = widths["0"].size
            index = grow_index(size, 3) if step % 20 == 5 else list(reversed(range(size)))[: max(4, size - 1)]
            reindex(model, widths, {"0": index}, optimizers=[optimizer])
        loss = F.cross_entropy(model(X), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        del loss
    assert losses[-1] < 0.5 * losses[0]


def test_a_model_that_reads_a_width_twice_shares_a_split_channel_once() -> None:
    model = Net(
        lambda m, x: m.head(torch.cat([y := m.conv(x), F.relu(y)], 1)), conv=conv(3, 4), head=head(8)
    ).eval()
    widths = discover(model, X)
    expected = model(X).detach()
    reindex(model, widths, {"conv": [0, 1, 2, 3, 3, 3]}, fresh=split)
    close(model(X), expected)


@pytest.mark.parametrize(("size", "by"), [(3, 4), (3, 5), (1, 1), (2, 0)])
def test_channels_that_are_added_in_pairs_stand_twice_but_for_an_odd_one(size: int, by: int) -> None:
    added = grow_index(size, by - by // 2)
    index = pair_index(size, by)
    assert len(index) == len(grow_index(size, by))
    assert index[:size].tolist() == list(range(size))
    counts = torch.bincount(index, minlength=len(added))
    assert counts[:size].tolist() == [1] * size
    assert counts[size:].tolist() == [2] * (by // 2) + [1] * (by % 2)
