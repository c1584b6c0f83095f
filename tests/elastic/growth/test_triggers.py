"""When and how far to grow, against what a person would decide from the whole history."""

from dataclasses import asdict
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from math import inf, isfinite, nan
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.errors import OptionError
from elastic.growth.amount import Growth
from elastic.growth.triggers import Periodic, Plateau

# Eighths are exact in binary, so that gains are compared without rounding.
METRICS = st.lists(
    st.one_of(st.integers(-8, 16).map(lambda k: k / 8), st.sampled_from([nan, inf, -inf])), max_size=40
)
MODES: tuple[Literal["max", "min"], ...] = ("max", "min")


def plateaus(values: list[float], patience: int, min_gain: float, mode: str) -> list[int]:
    """The observations at which a plateau is seen, each judged from the whole history."""

    def gains() -> list[int]:
        found: list[int] = []
        for i, value in enumerate(values):
            better = value if mode == "max" else -value
            held = values[found[-1]] if found else None
            before = None if held is None else held if mode == "max" else -held
            if isfinite(value) and (before is None or better >= before + min_gain):
                found.append(i)
        return found

    resets, fired = set(gains()), list[int]()
    for i in range(len(values)):
        since = max([r for r in resets if r <= i] + fired, default=-1)
        if i - since >= patience:
            fired.append(i)
    return fired


# --- plateau ---------------------------------------------------------------------------------------------


@given(METRICS, st.integers(1, 5), st.integers(1, 4).map(lambda k: k / 8), st.sampled_from(MODES))
@settings(max_examples=300)
def test_a_plateau_against_the_whole_history(
    values: list[float], patience: int, min_gain: float, mode: Literal["max", "min"]
) -> None:
    trigger = Plateau(patience, min_gain, mode)
    fired = [i for i, value in enumerate(values) if trigger.observe(value)]
    assert fired == plateaus(values, patience, min_gain, mode)


@given(METRICS, st.integers(1, 5), st.integers(1, 4).map(lambda k: k / 8))
def test_a_minimum_is_a_maximum_turned_over(values: list[float], patience: int, min_gain: float) -> None:
    high, low = Plateau(patience, min_gain), Plateau(patience, min_gain, "min")
    assert [high.observe(v) for v in values] == [low.observe(-v) for v in values]


@given(METRICS, st.integers(0, 40))
def test_a_plateau_can_be_stopped_and_continued(values: list[float], at: int) -> None:
    whole, first = Plateau(2, 0.125), Plateau(2, 0.125)
    expected = [whole.observe(v) for v in values]
    seen = [first.observe(v) for v in values[:at]]
    second = Plateau(2, 0.125)
    vars(second).update(asdict(first))
    assert seen + [second.observe(v) for v in values[at:]] == expected


def test_what_is_not_finite_is_no_gain() -> None:
    trigger = Plateau(patience=3, min_gain=0.1)
    assert [trigger.observe(v) for v in (nan, nan, nan, nan, 0.5, nan, inf, nan)] == (
        [False, False, True, False, False, False, False, True]
    )
    assert trigger.best == 0.5


def test_the_best_survives_growth() -> None:
    trigger = Plateau(patience=2, min_gain=0.125)
    assert [trigger.observe(v) for v in (0.5, 0.5, 0.5)] == [False, False, True]
    assert [trigger.observe(v) for v in (0.25, 0.5, 0.75, 0.75, 0.75)] == [False, True, False, False, True]


def test_slow_gains_add_up() -> None:
    """Four gains of half the minimum make two that count."""
    trigger = Plateau(patience=2, min_gain=0.25)
    assert not any(trigger.observe(0.125 * i) for i in range(9))


# --- periodic --------------------------------------------------------------------------------------------


@given(METRICS, st.integers(1, 7))
def test_a_period_is_blind(values: list[float], every: int) -> None:
    trigger = Periodic(every)
    fired = [i for i, value in enumerate(values) if trigger.observe(value)]
    assert fired == list(range(every - 1, len(values), every))


# --- growth ----------------------------------------------------------------------------------------------


@st.composite
def situations(draw: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Draw sizes now, and sizes at the start."""
    names = [f"w{i}" for i in range(draw(st.integers(1, 6)))]
    start = {name: draw(st.integers(1, 64)) for name in names}
    sizes = {name: draw(st.integers(1, 4 * start[name])) for name in names}
    return sizes, start


@given(
    situations(),
    st.sampled_from([1.0625, 1.25, 1.5, 2.0, 3.0]),
    st.sampled_from([1.0, 1.5, 2.0, 4.0]),
    st.sampled_from([1, 2, 4, 8]),
)
@settings(max_examples=300)
def test_growth_stays_within_its_bounds(
    situation: tuple[dict[str, int], dict[str, int]], factor: float, ceiling: float, multiple: int
) -> None:
    sizes, start = situation
    target = Growth(factor, ceiling, multiple).propose(sizes, start)
    room = [name for name in sizes if sizes[name] < int(ceiling * start[name])]
    assert list(target) == room
    for name, size in target.items():
        end = int(ceiling * start[name])
        assert sizes[name] + 1 <= size <= end
        assert size >= min(end, sizes[name] * factor)
        assert size == end or size % multiple == 0
        assert size == end or size < max(sizes[name] * factor, sizes[name]) + 1 + multiple


def test_growth_by_hand() -> None:
    growth = Growth(factor=1.5, ceiling=4)
    start = dict(a=4, b=4, c=5, d=8)
    assert growth.propose(start, start) == dict(a=6, b=6, c=8, d=12)
    assert growth.propose(start | dict(b=16, d=32), start) == dict(a=6, c=8)
    assert growth.propose(dict(a=16, b=16, c=20, d=32), start) == {}
    assert growth.propose(dict(a=16, b=15, c=20, d=32), start) == dict(b=16)
    assert growth.propose(dict(a=99, b=16, c=20, d=32), start) == {}


def test_one_channel_grows_by_one() -> None:
    assert Growth(factor=1.01).propose({"a": 1}, {"a": 1}) == {"a": 2}


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [(4, 8, 8), (6, 4, 12), (8, 8, 16), (10, 4, 16), (12, 8, 17), (16, 8, 17)],
)
def test_sizes_are_rounded_up_but_never_past_the_ceiling(size: int, multiple: int, expected: int) -> None:
    growth = Growth(factor=1.5, ceiling=17, multiple=multiple)
    assert growth.propose({"a": size}, {"a": 1}) == {"a": expected}


@pytest.mark.parametrize("size", [10, 50, 100, 110])
@pytest.mark.parametrize("factor", ["1.1", "1.15", "1.7"])
def test_decimal_factors_are_meant_as_written(size: int, factor: str) -> None:
    """1.1 × 50 is 55, though floating point says 55.00000000000001."""
    expected = int((Decimal(factor) * size).to_integral_value(ROUND_CEILING))
    assert Growth(factor=float(factor), ceiling=9).propose({"a": size}, {"a": size}) == {"a": expected}
    end = int((Decimal(factor) * size).to_integral_value(ROUND_FLOOR))
    assert Growth(factor=9, ceiling=float(factor)).propose({"a": size}, {"a": size}) == {"a": end}


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Plateau(patience=0), "patience=0 cannot be"),
        (lambda: Plateau(patience=-2), "patience=-2 cannot be"),
        (lambda: Plateau(mode="maximum"), "maximum"),  # type: ignore[arg-type]
        (lambda: Periodic(0), "every=0 cannot be"),
        (lambda: Growth(factor=1), "factor=1 cannot be"),
        (lambda: Growth(factor=nan), "factor=nan cannot be"),
        (lambda: Growth(factor=inf), "factor=inf cannot be"),
        (lambda: Growth(ceiling=0.5), "ceiling=0.5 cannot be"),
        (lambda: Growth(ceiling=nan), "ceiling=nan cannot be"),
        (lambda: Growth(multiple=0), "multiple=0 cannot be"),
        (lambda: Growth(multiple=2.5), "multiple=2.5 cannot be"),  # type: ignore[arg-type]
        (lambda: Growth(ceiling=inf), "ceiling=inf cannot be"),
        (lambda: Periodic(nan), "every=nan cannot be"),  # type: ignore[arg-type]
        (lambda: Growth(multiple=-4), "multiple=-4 cannot be"),
    ],
)
def test_what_makes_no_sense_is_refused_on_one_line(make: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match) as error:
        make()
    assert "\n" not in str(error.value)
    assert "set it" in str(error.value) or "needs" in str(error.value)
