"""How fresh channels start: which entries a strategy may touch, and what they are drawn from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic.surgery.fresh import (
    PAIRS,
    STRATEGIES,
    Patch,
    draw_he_normal,
    random,
    split,
    transfer,
    transfer_pair,
    zero_out,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def patch(rows: list[int], columns: list[int], kernel: tuple[int, ...] = (3, 3), seed: int = 0) -> Patch:
    """A weight as a strategy gets it: old position of each row and column, -1 where fresh, zeros there."""
    out, read = torch.tensor(rows), torch.tensor(columns)
    old = torch.randn(max(rows) + 1, max(columns) + 1, *kernel, generator=generator(seed)) + 0.01
    weight = old[out.clamp(min=0)][:, read.clamp(min=0)]
    times = torch.bincount(read[read >= 0], minlength=1)[read.clamp(min=0)]
    weight = weight / times.view(1, -1, *[1] * len(kernel))
    weight[out < 0], weight[:, read < 0] = 0, 0
    return Patch(layer="layer", weight=weight, fresh_out=out < 0, fresh_in=read < 0, in_source=read)


def parts(patch: Patch, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Old entries; fresh rows; fresh columns of old rows."""
    old, new = ~patch.fresh_out, patch.fresh_in
    return weight[old][:, ~new], weight[patch.fresh_out], weight[old][:, new]


CASES = {
    "rows": patch([0, 1, 2, -1], [0, 1]),
    "columns": patch([0, 1], [0, -1, 1]),
    "both": patch([0, -1, 1, -1], [-1, 0, 1, 2, -1]),
    "linear": patch([0, -1, 1], [0, 1, -1], kernel=()),
    "signal": patch([0, -1, 1], [0, 1, -1], kernel=(5,)),
    "nothing": patch([1, 0], [2, 1, 0]),
}
every_patch = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_strategy = pytest.mark.parametrize("fresh", STRATEGIES.values(), ids=STRATEGIES)


@every_patch
@every_strategy
def test_old_entries_and_the_given_weight_stay(fresh, case: Patch) -> None:
    before = case.weight.clone()
    after = fresh(case, generator())
    assert after.shape == case.weight.shape and after.dtype == case.weight.dtype
    assert torch.equal(case.weight, before), "the patch itself was changed"
    assert torch.equal(parts(case, after)[0], parts(case, before)[0])


@every_patch
@every_strategy
def test_a_seed_says_everything(fresh, case: Patch) -> None:
    one, same, other = (fresh(case, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert torch.equal(one, other) == (
        not case.fresh_out.any() and not (fresh is random and case.fresh_in.any())
    )


@every_patch
@pytest.mark.parametrize("fresh", [zero_out, split])
def test_function_preserving_strategies_do_not_read_fresh_channels(fresh, case: Patch) -> None:
    _, rows, columns = parts(case, fresh(case, generator()))
    assert not columns.any()
    assert rows.all()  # a fresh channel looks at everything, other fresh ones too


@every_patch
def test_random_fills_every_fresh_entry(case: Patch) -> None:
    _, rows, columns = parts(case, random(case, generator()))
    assert rows.all() and columns.all()


@pytest.mark.parametrize("shape", [(400, 30, 3, 3), (500, 200), (300, 40, 5)])
def test_he_normal_keeps_the_variance_of_a_rectified_signal(shape: tuple[int, ...]) -> None:
    """He et al., eq. 10: half the inputs are zero after ReLU, so weights of variance 2 / fan-in."""
    weight = draw_he_normal(torch.empty(shape), generator()).flatten(1)
    assert weight.mean().abs() < 0.01
    rectified = torch.randn(2000, weight.shape[1], generator=generator(1)).relu()
    assert (rectified @ weight.T).square().mean() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_type_and_draw_agree_in_every_precision(dtype: torch.dtype) -> None:
    drawn = draw_he_normal(torch.empty(4, 3, dtype=dtype), generator())
    assert drawn.dtype == dtype
    assert torch.equal(drawn, draw_he_normal(torch.empty(4, 3), generator()).to(dtype))


@given(
    columns=st.lists(st.integers(-1, 3), min_size=1, max_size=8).filter(lambda c: max(c) >= 0),
    noise=st.floats(0, 2),
    seed=st.integers(0, 99),
)
def test_noise_of_a_split_sums_to_zero_over_the_copies(columns: list[int], noise: float, seed: int) -> None:
    case = patch([0, 1, 2], columns, seed=seed)
    change = split(case, generator(seed), noise=noise) - case.weight
    for source in set(columns):
        places = [i for i, c in enumerate(columns) if c == source]
        torch.testing.assert_close(change[:, places].sum(1), torch.zeros(3, 3, 3), rtol=0, atol=1e-5)
        parted = source >= 0 and len(places) > 1 and noise > 1e-3
        assert bool(change[:, places].any()) == parted or 0 < noise <= 1e-3


def test_noise_is_as_large_as_asked() -> None:
    case = patch(list(range(64)), [0, 0, 1, 1, 2, 3])
    copies = case.weight[:, :4]
    change = (split(case, generator(), noise=0.1) - case.weight)[:, :4]
    # taking the mean of two draws away leaves half their variance
    assert change.std() == pytest.approx(0.1 * float(copies.square().mean().sqrt()) * 0.5**0.5, rel=0.1)
    assert torch.equal(split(case, generator(), noise=0.0), case.weight)


def test_strategies_by_name() -> None:
    assert dict(STRATEGIES) == {"zero_out": zero_out, "random": random, "split": split}


@pytest.mark.parametrize("name", PAIRS)
def test_readers_of_a_channel_that_stands_twice_are_opposite(name: str) -> None:
    case = patch([0, 1, 2], [0, 1, 2, 3, 2, 3])
    change = PAIRS[name][1](case, generator()) - case.weight * (4 / 6 if name == "transfer" else 1) ** 0.5
    torch.testing.assert_close(change[:, 2:4], -change[:, 4:])
    assert change[:, 2:].abs().min() > 0 and change[:, :2].abs().max() < 1e-6


def test_transfer_keeps_the_length_of_rows_that_gain_columns() -> None:
    """Grown from 40 to 60, split to 80 columns: old rows and fresh ones are as long as old ones were."""
    rows = torch.randn(50, 40, 3, 3, generator=generator()) * 0.01
    fresh_out, fresh_in = torch.arange(70) >= 50, torch.arange(60) >= 40
    weight = torch.zeros(70, 60, 3, 3)
    weight[:50, :40] = rows
    grown = transfer(
        Patch("", weight, fresh_out, fresh_in, torch.arange(60).where(~fresh_in, -1)), generator(1)
    )
    source = torch.cat([torch.arange(60), torch.arange(40, 60)])
    shared = grown[:, source] / torch.bincount(source)[source].view(1, -1, 1, 1)
    none = torch.zeros(70, dtype=torch.bool), torch.zeros(80, dtype=torch.bool)
    done = transfer_pair(Patch("", shared, *none, source), generator(2))
    lengths = done.flatten(1).norm(dim=1) / rows.flatten(1).norm(dim=1).mean()
    assert lengths[:50].mean() == pytest.approx(1, rel=0.03)
    assert lengths[50:].mean() == pytest.approx(1, rel=0.15)


def test_transfer_from_zeros_draws_what_can_learn() -> None:
    case = Patch("", torch.zeros(4, 3), torch.arange(4) >= 2, torch.arange(3) >= 2, torch.tensor([0, 1, -1]))
    assert transfer(case, generator())[2:].abs().min() > 0
