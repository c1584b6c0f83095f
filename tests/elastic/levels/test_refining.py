"""What a deadline leaves time for, by a clock that passes only where a level answers."""

import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.levels import Late, refining, runtime
from elastic.levels.cascade import run_cascade
from elastic.levels.refining import PART, SURE, RefiningRuntime, list_unsure
from elastic.levels.runtime import HEADROOM
from elastic.measure.machine import RunCost

BATCH, CORE_MS, WHOLE_MS = 32, 8.0, 32.0  # of a batch


class Clock:
    def __init__(self) -> None:
        self.now, self.slowdown = 0.0, 1.0

    def perf_counter(self) -> float:
        return self.now


class Answering(nn.Module):
    """Take so long for each input, and say of input i the i-th of the answers."""

    def __init__(self, clock: Clock, batch_ms: float, logits_BK: Tensor) -> None:
        super().__init__()
        self.clock, self.input_s, self.logits_BK = clock, batch_ms / 1e3 / BATCH, logits_BK
        self.asked: list[list[int]] = []

    def forward(self, x_B: Tensor) -> Tensor:
        self.clock.now += self.clock.slowdown * self.input_s * len(x_B)
        self.asked.append(x_B.tolist())
        return self.logits_BK[x_B]


X = torch.arange(BATCH)


def make_runtime(seed: int = 0, spread: float = 2.0) -> tuple[RefiningRuntime, Clock, list[Answering]]:
    """Make a runtime of three levels; the one between is never needed."""
    clock, generator = Clock(), torch.Generator().manual_seed(seed)
    levels = [
        Answering(clock, ms, spread * torch.randn(BATCH, 5, generator=generator))
        for ms in (CORE_MS, 16.0, WHOLE_MS)
    ]
    costs = iter([RunCost(CORE_MS, 1), RunCost(16.0, 2), RunCost(WHOLE_MS, 4)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "measure_cost", lambda *_: next(costs))
        return RefiningRuntime(levels, X), clock, levels


@pytest.fixture(autouse=True)
def _no_clock_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that forgets to set the clock must not pass by the machine's."""
    monkeypatch.setattr(refining, "time", None)


def use(clock: Clock) -> None:
    refining.time = SimpleNamespace(perf_counter=clock.perf_counter)  # type: ignore[assignment]


@given(seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_without_a_deadline_it_is_a_cascade(seed: int) -> None:
    serve, clock, levels = make_runtime(seed)
    use(clock)
    logits_BK, level = serve.answer(X)
    core, _, whole = levels
    asked = [core.logits_BK.__getitem__, whole.logits_BK.__getitem__]
    expected_BK, index_B = run_cascade(asked, X, SURE)
    assert torch.equal(logits_BK, expected_BK)
    assert level == (2 if int(index_B.sum()) else 0)


@given(deadline_ms=st.floats(CORE_MS, 60.0), slowdown=st.floats(1.0, 4.0))
@settings(max_examples=50, deadline=None)
def test_the_least_sure_are_refined_as_long_as_the_deadline_has_room(
    deadline_ms: float, slowdown: float
) -> None:
    serve, clock, levels = make_runtime(spread=0.3)  # sure of nothing
    use(clock)
    serve.within(latency_ms=deadline_ms)
    for _ in range(30):  # the machine's speed is learnt from what requests take
        clock.slowdown, begin = slowdown, clock.now
        for level in levels:
            level.asked.clear()
        logits_BK, _ = serve.answer(X)
        took_ms = 1e3 * (clock.now - begin)
    core_ms, part_ms = slowdown * CORE_MS, slowdown * WHOLE_MS * PART / BATCH
    room_ms = HEADROOM * deadline_ms - core_ms
    parts = min(BATCH // PART, max(0, int(room_ms / part_ms + 1e-6)))
    assert took_ms == pytest.approx(core_ms + parts * part_ms)
    assert took_ms <= max(core_ms, deadline_ms) + 1e-6
    order = list_unsure(levels[0].logits_BK).tolist()
    assert [i for part in levels[2].asked for i in part] == order[: parts * PART]
    refined = torch.isin(X, torch.tensor(order[: parts * PART], dtype=torch.long))
    assert torch.equal(logits_BK[refined], levels[2].logits_BK[refined])
    assert torch.equal(logits_BK[~refined], levels[0].logits_BK[~refined])
    assert not levels[1].asked


def test_what_is_sure_is_not_computed_again() -> None:
    serve, clock, levels = make_runtime()
    use(clock)
    levels[0].logits_BK = 100 * torch.eye(5)[torch.arange(BATCH) % 5]
    _, level = serve.answer(X)
    assert level == 0 and not levels[2].asked


def test_a_part_that_was_slow_is_remembered_for_some_requests() -> None:
    serve, clock, levels = make_runtime(spread=0.3)
    use(clock)
    serve.within(latency_ms=22.0)  # room for the core and one part
    counts = []
    for request in range(40):
        levels[2].asked.clear()
        levels[2].input_s = (10 if request == 3 else 1) * WHOLE_MS / 1e3 / BATCH
        serve.answer(X)
        counts.append(len(levels[2].asked))
    assert counts[:4] == [1, 1, 1, 1]
    assert counts[4] == 0, "the next one is careful"
    assert counts[-1] == 1, "but not for ever"


def test_an_empty_request_is_answered() -> None:
    serve, clock, _ = make_runtime()
    use(clock)
    serve.within(latency_ms=100)
    logits_BK, level = serve.answer(X[:0])
    assert logits_BK.shape == (0, 5) and level == 0


def test_what_does_not_tell_classes_is_refused() -> None:
    serve, clock, levels = make_runtime()
    use(clock)
    serve.levels[0] = nn.Sequential(levels[0], nn.Unflatten(1, (5, 1, 1)))
    with pytest.raises(
        StructureError, match=r"a tensor of \(32, 5, 1, 1\).*: take networks that return scores"
    ):
        serve.answer(X)


def test_a_request_that_cannot_be_in_time_is_given_up() -> None:
    serve, clock, levels = make_runtime()
    use(clock)
    serve.within(latency_ms=100)
    with pytest.raises(Late):
        serve.answer(X, left_ms=CORE_MS / 2)
    assert not levels[0].asked


def test_a_budget_of_memory_says_which_level_is_the_largest() -> None:
    serve, clock, levels = make_runtime(spread=0.3)
    use(clock)
    assert serve.within(memory_mb=2) == 1
    assert serve.answer(X)[1] == 1 and not levels[2].asked
    serve.within(memory_mb=1)
    assert serve.answer(X)[1] == 0


def test_threads_get_the_answers_to_their_own_requests() -> None:
    serve, clock, levels = make_runtime(spread=0.3)
    use(clock)
    answers: dict[int, Tensor] = {}

    def ask(i: int) -> None:
        answers[i] = serve.answer(X[i : i + 4])[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(0, BATCH, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, logits_BK in answers.items():
        assert torch.equal(logits_BK, levels[2].logits_BK[i : i + 4])
