"""The budget's path, and the controller in a closed loop with plants that stand for a network's gates."""

from math import erfc, exp, inf, log, nan, sqrt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import OptionError
from elastic.pruning.budget import LEAST, MOST, RATE, Budget

GATES = 20_000


# --- path ------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**7), st.floats(0.05, 1), st.floats(1, 10))
def test_the_path_falls_to_the_budget_and_stays(target: int, end: float, ratio: float) -> None:
    budget = Budget(target, end=end, peak=ratio * target)
    path = [budget.path(i / 100) for i in range(101)]
    assert path[0] == pytest.approx(ratio * target)
    assert Budget(target, end=end).path(0) == target, "nothing larger has been seen"
    assert path == sorted(path, reverse=True)
    assert all(size >= target for size in path)
    assert budget.path(end) == target
    assert budget.path(1.0) == target


def test_the_path_stays_until_it_begins() -> None:
    budget = Budget(1000, begin=0.4, end=0.8, peak=3000)
    assert budget.path(0.1) == budget.path(0.4) == 3000
    assert budget.path(0.6) == pytest.approx(1000 * (1 + 2 / 8))
    assert budget.path(0.8) == 1000


def test_the_path_is_cubic() -> None:
    budget = Budget(1000, end=0.8, peak=3000)
    assert budget.path(0.4) == pytest.approx(1000 * (1 + 2 / 8))


@given(st.floats(0.01, 0.99), st.floats(1.01, 30))
def test_the_path_falls_from_where_a_network_was_largest(since: float, ratio: float) -> None:
    """What has just grown is not above its path, or the penalty would shut it before it has learnt."""
    budget = Budget(1000, end=1.0)
    budget.steer(1e-4, 500, since / 2)
    budget.steer(1e-4, 1000 * ratio, since)
    assert budget.path(since) == pytest.approx(1000 * ratio)
    assert budget.path((since + 1) / 2) == pytest.approx(1000 * (1 + (ratio - 1) / 8))


def test_what_grows_after_the_path_has_ended_has_none() -> None:
    budget = Budget(1000, end=0.5)
    budget.steer(1e-4, 9000, 0.6)
    assert budget.path(0.6) == 1000


# --- one step --------------------------------------------------------------------------------------------


@given(st.floats(1e-7, 1e-2), st.floats(1.01, 50), st.floats(0, 1))
def test_lambda_rises_above_the_path_and_falls_below(penalty: float, ratio: float, progress: float) -> None:
    def budget() -> Budget:
        return Budget(1000, peak=1e9, last_progress=progress - 0.1)

    on_path = budget().path(progress)
    if on_path * ratio < 1e9:  # else it has never been larger, and a new path begins
        assert budget().steer(penalty, on_path * ratio, progress) > penalty
    assert budget().steer(penalty, on_path / ratio, progress) < penalty
    assert budget().steer(penalty, on_path, progress) == pytest.approx(penalty)


@given(st.floats(1e-7, 1e-2), st.floats(1.01, 50), st.floats(1.01, 50))
def test_the_further_off_the_larger_the_step_up_to_the_rate(penalty: float, a: float, b: float) -> None:
    near, far = sorted((a, b))
    budgets = [Budget(1000, last_progress=1 - 0.1 / RATE) for _ in range(2)]
    sizes = (1000 * near, 1000 * far)
    steps = [log(b.steer(penalty, size, 1.0) / penalty) for b, size in zip(budgets, sizes, strict=True)]
    assert 0 < steps[0] <= steps[1] + 1e-9 <= 0.1 + 2e-9
    assert steps[0] == pytest.approx(0.1 * min(1, log(near)), rel=1e-6)


@given(st.lists(st.integers(1, 1000), min_size=1), st.floats(1e-7, 1e-2))
def test_lambda_waits_for_a_network_that_is_still_small(sizes: list[int], penalty: float) -> None:
    """Else it would be four decades down when the network has grown, and come up too late to be gentle."""
    budget = Budget(1000)
    assert {budget.steer(penalty, size, i / len(sizes)) for i, size in enumerate(sizes)} == {penalty}


def test_where_the_network_is_heading_counts() -> None:
    falling, rising, resting = (Budget(1000, peak=5000) for _ in range(3))
    for budget, before in ((falling, 1100), (rising, 900), (resting, 1000)):
        budget.steer(1e-4, before, 0.9)
    now = [budget.steer(1e-4, 1000, 1.0) for budget in (falling, resting, rising)]
    assert now[0] < now[1] < now[2]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60), st.floats(LEAST, MOST))
def test_lambda_stays_within_its_bounds(sizes: list[int], penalty: float) -> None:
    budget = Budget(1000)
    for i, size in enumerate(sizes):
        penalty = budget.steer(penalty, size, i / len(sizes))
        assert LEAST <= penalty <= MOST


def test_an_empty_network_does_not_stop_the_controller() -> None:
    budget = Budget(1000, peak=5000)
    assert budget.steer(1e-4, 0, 0.5) < 1e-4
    assert budget.steer(1e-4, 0, 0.6) < 1e-4


def test_the_controller_can_be_stopped_and_continued() -> None:
    whole, first = Budget(1000), Budget(1000)
    sizes = [5000 - 70 * i for i in range(50)]
    a = b = 1e-4
    for i, size in enumerate(sizes):
        a = whole.steer(a, size, i / 50)
        if i == 20:
            first = Budget(**vars(first))
        b = first.steer(b, size, i / 50)
    assert a == b


# --- closed loop -----------------------------------------------------------------------------------------


def run(
    budget: Budget, start: float, looks: int, lag: float, median: float, spread: float, begin: float = 0.05
) -> float:
    """The size at 85 % of a run on a plant of gates whose use to the loss is log-normal.

    Gates of less use than λ close, at a rate of 1/lag; where λ falls they re-open, three times more slowly.
    """
    penalty, size = start, float(GATES)
    for i in range(int(0.85 * looks)):
        progress = i / looks
        useful = GATES * erfc(log(penalty / median) / spread / sqrt(2)) / 2 if progress >= begin else GATES
        size += (useful - size) / lag * (1 if useful < size else 1 / 3)
        if progress >= begin:
            penalty = budget.steer(penalty, size, progress)
    return size


@pytest.mark.parametrize("target", [1000, 5000, 15000])
@pytest.mark.parametrize("start", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("lag", [10, 50])
@pytest.mark.parametrize(("median", "spread"), [(1e-3, 1.5), (1e-2, 1.0), (1e-4, 2.0)])
def test_a_run_lands_on_its_budget(
    target: int, start: float, lag: float, median: float, spread: float
) -> None:
    """30,000 steps (3,000 looks)."""
    size = run(Budget(target), start, 3000, lag, median, spread)
    assert size == pytest.approx(target, rel=0.05)


def test_a_short_run_lands_if_it_starts_near() -> None:
    size = run(Budget(5000), 1e-3, 300, 10, 1e-3, 1.5)
    assert size == pytest.approx(5000, rel=0.05)


def test_a_saturated_plant_is_left_at_the_bound() -> None:
    """A budget that no λ reaches: λ stops at its bound and nothing overflows."""
    budget, penalty = Budget(10), 1e-4
    for i in range(5000):
        penalty = budget.steer(penalty, 10_000, i / 5000)
    assert penalty == MOST
    budget = Budget(10_000, peak=20_000)
    for i in range(5000):
        penalty = budget.steer(penalty, 10, i / 5000)
    assert penalty == LEAST


def test_gates_trained_by_gradient_land_on_their_budget() -> None:
    """Scores under the penalty's own gradient λ·σ(1 − σ) against a constant pull of the loss."""
    import torch

    drawn = torch.Generator().manual_seed(0)
    pull = torch.exp(torch.randn(GATES, generator=drawn) * 1.5 + log(1e-3))
    score, moment = torch.ones(GATES), torch.zeros(GATES)
    budget, penalty, looks = Budget(5000), 1e-4, 2000
    for i in range(int(0.85 * looks)):
        progress = i / looks
        sigma = torch.sigmoid(score)
        gradient = (penalty * (progress >= 0.05) - pull) * sigma * (1 - sigma)
        moment = 0.9 * moment + 0.1 * gradient
        score = (score - 0.03 * moment / (moment.abs() + 1e-5)).clamp(-3, 3)
        if progress >= 0.05:
            penalty = budget.steer(penalty, int((score > 0).sum()), progress)
    assert int((score > 0).sum()) == pytest.approx(5000, rel=0.05)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(target=0), "budget of 0"),
        (dict(target=-1), "budget of -1"),
        (dict(target=2.5), "budget of 2.5"),
        (dict(target=0.5), "budget of 0.5"),
        (dict(target=nan), "budget of nan"),
        (dict(target=inf), "budget of inf"),
        (dict(target="1e999"), "budget of 1e999"),
        (dict(target=True), "budget of True"),
        (dict(target="many"), "budget of many"),
        (dict(target=None), "budget of None"),
        (dict(target=[2]), "budget of"),
        (dict(target=10, end=0), "from 0.0 to 0 of"),
        (dict(target=10, end=1.5), "end=1.5 cannot be"),
        (dict(target=10, end=nan), "end=nan cannot be"),
        (dict(target=10, begin=0.7), "from 0.7 to 0.7 of"),
        (dict(target=10, begin=-0.1), "begin=-0.1 cannot be: set it to a number from 0 to 1"),
    ],
)
def test_what_makes_no_sense_is_refused_on_one_line(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match) as error:
        Budget(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("written", [2000, 2000.0, 2e3, "2000", "2e3", " 2_000 "])
def test_a_budget_may_be_written_in_several_ways(written: Any) -> None:
    budget = Budget(written)
    assert budget.target == 2000 and isinstance(budget.target, int)


def test_a_step_is_a_factor() -> None:
    budget = Budget(1000, last_progress=1 - 0.05 / RATE)
    assert budget.steer(1e-4, 1e9, 1.0) == pytest.approx(1e-4 * exp(0.05))
