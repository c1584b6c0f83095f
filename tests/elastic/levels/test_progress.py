"""A level that will be late is stopped, and a smaller one answers, in the time that is left."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from elastic.levels import progress, runtime
from elastic.levels.alone import make_alone
from elastic.levels.progress import Late, look, mark_progress, stop_when_late
from elastic.levels.runtime import Runtime
from elastic.measure.machine import RunCost
from elastic.models import convnet

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
            look(step / 10)
        return torch.tensor(float(self.number))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (progress, runtime):
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
    assert [serve.answer(X, left)[1] for left in (9.0, 7.0, 2.0, 0.1)] == [2, 1, 0, 0]
    assert serve.level == 2, "the machine is as fast as it was"


def test_without_a_deadline_nothing_is_stopped(served: Any) -> None:
    serve, machine = served
    machine.slower = 100.0
    assert serve.answer(X)[1] == 2
    serve.within(memory_mb=8)
    assert serve.answer(X)[1] == 2


def test_a_network_says_early_that_it_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_alone(convnet((8, 8, 8, 8)).eval(), X)
    done: list[float] = []
    monkeypatch.setattr(progress, "_thread", SimpleNamespace(start_s=0.0, left_ms=None))
    expected = net(X)
    with stop_when_late(1e6):
        assert torch.equal(net(X), expected), "it has time"
    for left_ms in (1e-6, 1e-3):
        with pytest.raises(Late) as late, stop_when_late(left_ms):
            net(X)
        done.append(late.value.expected_ms)
        assert late.value.expected_ms > left_ms
    assert torch.equal(net(X), expected) and torch.equal(copy.deepcopy(net)(X), expected)


def test_marks_stand_at_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    net = torch.fx.symbolic_trace(nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(40))))
    now = iter(range(10**6))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(now)))
    mark_progress(net, X)
    parts = [node.args[0] for node in net.graph.nodes if node.target is look]
    assert len(parts) == progress.PLACES - 1
    assert parts == pytest.approx([k / progress.PLACES for k in range(1, progress.PLACES)], abs=0.03)
