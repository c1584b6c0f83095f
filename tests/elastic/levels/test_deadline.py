"""A level that will be late is stopped, and a smaller one answers, in the time that is left."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from elastic.levels import deadline, runtime
from elastic.levels.alone import InParts
from elastic.levels.deadline import Late, check_deadline, stop_when_late
from elastic.levels.runtime import Runtime
from elastic.measure.machine import RunCost

X = torch.randn(16, 1, 8, 8)
MS = (1.0, 4.0, 8.0)


class Clock:
    """What time it is, in seconds; levels and tests move it."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Working(nn.Module):
    """Take some milliseconds in ten steps, on a machine that is so much slower, and answer with a number."""

    def __init__(self, clock: Clock, machine: SimpleNamespace, number: int) -> None:
        super().__init__()
        self.clock, self.machine, self.number = clock, machine, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in range(1, 11):
            self.clock.now += self.machine.slower * MS[self.number] / 10 / 1e3
            check_deadline(step / 10)
        return torch.tensor(float(self.number))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (deadline, runtime):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


@pytest.fixture
def served(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> tuple[Runtime, SimpleNamespace]:
    machine = SimpleNamespace(slower=1.0)
    costs = (RunCost(ms, ms) for ms in MS)
    monkeypatch.setattr(runtime, "measure_cost", lambda *_: next(costs))
    return Runtime([Working(clock, machine, k) for k in range(len(MS))], X), machine


def test_the_first_request_of_a_load_is_in_time(served: Any, clock: Clock) -> None:
    serve, machine = served
    serve.within(latency_ms=10)
    assert serve.answer(X) == (torch.tensor(2.0), 2)
    machine.slower = 2.0
    begin = clock.now
    assert serve.answer(X)[1] == 1, "16 ms are expected after the first step, and 8 of the smaller one"
    assert 1e3 * (clock.now - begin) == pytest.approx(1.6 + 8.0)
    assert serve.level == 1 and serve.slowdown > 1.9, "and the next one begins with it"
    machine.slower = 20.0
    assert serve.answer(X)[1] == 0, "which cannot be in time either"


def test_a_request_that_has_waited_has_less_time(served: Any) -> None:
    serve, _ = served
    serve.within(latency_ms=10)
    assert [serve.answer(X, left)[1] for left in (9.0, 7.0, 2.0)] == [2, 1, 0]
    assert serve.level == 2, "the machine is as fast as it was"


def test_a_request_that_cannot_be_in_time_is_given_up(served: Any, clock: Clock) -> None:
    serve, machine = served
    serve.within(latency_ms=10)
    begin = clock.now
    for left_ms in (0.9, 0.0, -3.0):
        with pytest.raises(Late, match="1 ms are expected"):
            serve.answer(X, left_ms)
    assert clock.now == begin, "the next one need not wait for it"
    machine.slower = 40.0
    with pytest.raises(Late):
        serve.answer(X, 10.0)
    assert 1e3 * (clock.now - begin) == pytest.approx(32), "after a tenth of the largest"
    machine.slower, given_up = 1.0, 0
    while given_up < 10:
        try:
            assert serve.answer(X, 10.0)[1] == 0
            break
        except Late:
            given_up += 1
    assert 0 < given_up < 10, "it does not give up for good"


def test_without_a_deadline_nothing_is_stopped(served: Any) -> None:
    serve, machine = served
    machine.slower = 100.0
    assert serve.answer(X)[1] == 2
    serve.within(memory_mb=8)
    assert serve.answer(X)[1] == 2


class Slow(nn.Module):
    """Take a millisecond for each input, and answer with two things."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.done = clock, 0

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.clock.now += len(x) / 1e3
        self.done += len(x)
        return {"sum": x.sum((1, 2, 3)), "same": x}


@pytest.mark.parametrize("size", [1, 8, 9, 16, 31])
def test_a_batch_in_parts_is_the_batch(clock: Clock, size: int) -> None:
    x = torch.randn(size, 1, 2, 2)
    with stop_when_late(size + 0.5):
        found = InParts(Slow(clock))(x)
    assert torch.equal(found["same"], x) and torch.equal(found["sum"], x.sum((1, 2, 3)))


def test_a_batch_is_late_after_its_first_part(clock: Clock) -> None:
    net = Slow(clock)
    with pytest.raises(Late) as late, stop_when_late(31.5):
        InParts(net)(torch.randn(32, 1, 2, 2))
    assert late.value.expected_ms == pytest.approx(32) and net.done == 8
    assert InParts(net)(torch.randn(32, 1, 2, 2))["sum"].shape == (32,), "nobody waits for it any more"
