"""A cascade against one that asks every network about every input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic.errors import OptionError, StructureError
from elastic.levels.cascade import count_cascade_macs, fit_threshold, measure_confidence, run_cascade

MACS = (10, 25, 70)


def make_logits(seed: int, inputs: int = 40, nets: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(inputs, 5, generator=generator) for _ in range(nets)]


def look_up(logits_LNK: list[Tensor]) -> list[Callable[[Tensor], Tensor]]:
    return [logits_NK.__getitem__ for logits_NK in logits_LNK]


def ask_all(logits_LNK: list[Tensor], threshold: float) -> list[int]:
    """Say of each input which network is the first to be sure, one by one."""
    indices = []
    for n in range(len(logits_LNK[0])):
        sure = [float(torch.softmax(logits_NK[n], 0).max()) >= threshold for logits_NK in logits_LNK[:-1]]
        indices.append([*sure, True].index(True))
    return indices


@given(seed=st.integers(0, 99), threshold=st.floats(0, 1), nets=st.integers(1, 4))
def test_each_input_is_answered_by_the_first_network_that_is_sure(
    seed: int, threshold: float, nets: int
) -> None:
    logits_LNK = make_logits(seed, nets=nets)
    answer_NK, index_N = run_cascade(look_up(logits_LNK), torch.arange(40), threshold)
    assert index_N.tolist() == ask_all(logits_LNK, threshold)
    for n, k in enumerate(index_N.tolist()):
        assert torch.equal(answer_NK[n], logits_LNK[k][n])


def test_a_network_is_asked_about_those_inputs_alone_that_none_before_was_sure_of() -> None:
    logits_LNK, asked = make_logits(0), list[list[int]]()

    def note(k: int) -> Callable[[Tensor], Tensor]:
        def answer(x_N: Tensor) -> Tensor:
            asked.append(x_N.tolist())
            return logits_LNK[k][x_N]

        return answer

    _, index_N = run_cascade([note(k) for k in range(3)], torch.arange(40), 0.8)
    assert asked == [[n for n, index in enumerate(index_N.tolist()) if index >= k] for k in range(3)]
    asked.clear()
    run_cascade([note(k) for k in range(3)], torch.arange(40), 0.0)
    assert len(asked) == 1, "where the first is always sure, no other is executed"


def test_what_a_network_has_said_stays_as_it_is() -> None:
    logits_LNK = make_logits(0)
    before = logits_LNK[0].clone()
    run_cascade([lambda _: logits_LNK[0], lambda x_N: logits_LNK[1][x_N]], torch.arange(40), 1.0)
    assert torch.equal(logits_LNK[0], before)


def test_an_input_takes_what_all_networks_take_that_it_went_to() -> None:
    assert count_cascade_macs(torch.tensor([0, 2, 1]), MACS).tolist() == [10, 105, 35]


@given(seed=st.integers(0, 99), budget=st.floats(10, 120))
def test_the_threshold_is_the_highest_within_the_budget(seed: int, budget: float) -> None:
    logits_LNK = make_logits(seed)

    def measure(threshold: float) -> float:
        index_N = run_cascade(look_up(logits_LNK), torch.arange(40), threshold)[1]
        return float(count_cascade_macs(index_N, MACS).mean())

    threshold = fit_threshold(logits_LNK, MACS, budget)
    assert measure(threshold) <= budget
    confidences = torch.cat([measure_confidence(logits_NK) for logits_NK in logits_LNK[:-1]])
    higher = confidences[confidences > threshold]
    assert not len(higher) or measure(float(higher.min())) > budget


def test_a_budget_below_the_smallest_is_refused() -> None:
    for budget in (9, float("nan")):
        with pytest.raises(OptionError, match=f"{budget} MACs: the smallest level alone takes 10"):
            fit_threshold(make_logits(0), MACS, budget)


@pytest.mark.parametrize(("nets", "macs"), [(3, MACS[:2]), (2, MACS), (0, ())])
def test_each_network_has_its_macs(nets: int, macs: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=f"{nets} networks, MACs of {len(macs)}: give those of each"):
        fit_threshold(make_logits(0, nets=nets), macs, 50)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (torch.zeros(40, 5, 2, 2), r"a tensor of \(40, 5, 2, 2\)"),
        (torch.zeros(40), r"a tensor of \(40,\)"),
        ({"logits": torch.zeros(40, 5)}, "a dict"),
    ],
)
def test_answers_that_are_no_scores_of_classes_are_refused(answer: Any, kind: str) -> None:
    for nets in ([lambda _: answer], [*look_up(make_logits(0, nets=1)), lambda _: answer]):
        with pytest.raises(StructureError, match=f"answers with {kind}.*: take networks that return scores"):
            run_cascade(nets, torch.arange(40), 1.0)


@pytest.mark.parametrize(("count", "threshold"), [(0, 0.5), (2, -0.1), (2, 1.5)])
def test_what_can_be_no_cascade_is_refused(count: int, threshold: float) -> None:
    with pytest.raises(OptionError, match="give one or more, and 0 to 1"):
        run_cascade(look_up(make_logits(0))[:count], torch.arange(40), threshold)
