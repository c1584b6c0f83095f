"""Which level runs: budgets, and deadlines on a machine that gets slower and faster again."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.errors import FileError, OptionError
from elastic.levels import runtime
from elastic.levels.nested import Levels
from elastic.levels.runtime import Runtime
from elastic.levels.sizes import level_sizes
from elastic.measure import machine, timing
from elastic.measure.machine import RunCost, measure_latency_ms, measure_memory_mb, read_rapl_joules
from elastic.models import convnet
from elastic.widths.discovery import discover

X = torch.randn(1, 1, 8, 8)
MS = (1.0, 2.0, 4.0, 8.0)  # what the levels take here


def served() -> Runtime:
    """Four networks that answer with their number, and costs that are known."""
    levels = [nn.Sequential(nn.Flatten(), nn.Linear(64, 1)) for _ in MS]
    for k, level in enumerate(levels):
        nn.init.zeros_(level[1].weight)
        nn.init.constant_(level[1].bias, k)
    costs = (RunCost(ms, 10 * ms, 5 * ms) for ms in MS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "measure_cost", lambda *_: next(costs))
        return Runtime(levels, X)


@given(st.floats(1, 20))
@settings(max_examples=50, deadline=None)
def test_the_largest_level_within_a_budget_runs(budget: float) -> None:
    for name, unit in (("latency_ms", 1), ("memory_mb", 10), ("energy_mj", 5)):
        serve = served()
        k = serve.within(**{name: budget * unit})
        assert MS[k] <= budget and (k == 3 or MS[k + 1] > budget)
        assert serve(X).item() == k


def test_all_budgets_hold_together() -> None:
    serve = served()
    assert serve.within(latency_ms=100, memory_mb=25, energy_mj=100) == 1
    for _ in range(100):
        serve.observe(serve.level, 0.01)
    assert serve.level == 1, "a machine that got faster has no more memory"
    assert serve.within(latency_ms=100) == 3


def test_budgets_that_no_level_meets_are_refused() -> None:
    serve = served()
    with pytest.raises(OptionError, match=r"no level is within latency_ms=0.5: the smallest takes 1"):
        serve.within(latency_ms=0.5)
    with pytest.raises(OptionError, match="watts cannot be budgeted: there is no such budget"):
        serve.within(watts=1)
    serve.costs = [RunCost(ms, 1) for ms in MS]
    with pytest.raises(OptionError, match="energy_mj cannot be budgeted: there is no energy counter"):
        serve.within(energy_mj=1)
    assert serve.level == 3, "as it was"


def test_without_a_level_there_is_nothing_to_run() -> None:
    with pytest.raises(OptionError, match="there is no level to run: give one or more"):
        Runtime([], X)


def drive(serve: Runtime, slowdown: float, requests: int) -> list[int]:
    """The levels of requests on a machine that is so much slower than it was at calibration."""
    used = []
    for _ in range(requests):
        used.append(serve.level)
        serve.observe(serve.level, slowdown * MS[serve.level])
    return used


@given(st.floats(0.5, 7.9))
@settings(max_examples=50, deadline=None)
def test_under_a_steady_load_it_comes_to_one_level_that_meets_the_deadline(slowdown: float) -> None:
    serve = served()
    serve.within(latency_ms=8)
    settled = set(drive(serve, slowdown, 300)[200:])
    assert len(settled) == 1, "no to and fro"
    (k,) = settled
    assert slowdown * MS[k] <= 8 * (1 + 1e-6)
    assert k == 3 or slowdown * MS[k + 1] > 0.8 * 8 * (1 - 1e-6), "no smaller than it must be"


def test_it_steps_down_at_once_and_up_again_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "SMOOTHING", 1.0)
    monkeypatch.setattr(runtime, "PATIENCE", 5)
    serve = served()
    serve.within(latency_ms=8)
    assert drive(serve, 1.0, 3) == [3, 3, 3]
    assert drive(serve, 4.0, 3) == [3, 1, 1], "after one late answer"
    assert drive(serve, 1.0, 12) == [1] * 5 + [2] * 5 + [2] * 2, "8 ms is not roomy for the largest"
    serve.within(latency_ms=10.1)
    assert drive(serve, 4.0, 2) == [3, 1]
    assert drive(serve, 1.0, 6) == [1] * 5 + [3], "as far as there is room"


def test_one_slow_answer_in_time_is_no_load() -> None:
    serve = served()
    serve.within(latency_ms=10.1)
    drive(serve, 1.0, 20)
    assert drive(serve, 1.25, 1) + drive(serve, 1.0, 20) == [3] * 21


def test_a_deadline_missed_is_believed_at_once() -> None:
    """However much was in time before; the way back is as slow as ever."""
    serve = served()
    serve.within(latency_ms=10.1)
    drive(serve, 1.0, 1000)
    assert drive(serve, 2.6, 2) == [3, 1], "of 4 ms 10.4 would come, and of 2 ms 5.2"
    back = drive(serve, 1.0, 30)
    assert back.index(3) >= runtime.PATIENCE and back[back.index(3) :] == [3] * len(back[back.index(3) :])


def test_without_a_deadline_nothing_is_watched() -> None:
    serve = served()
    serve.within(memory_mb=45)
    assert set(drive(serve, 100.0, 50)) == {2}


def nested() -> Levels:
    torch.manual_seed(0)
    net = convnet((8, 8, 8, 8))
    widths = discover(net, X)
    return Levels(net, widths, level_sizes(net, widths, X, [0.25, 0.5]))


class NoWork(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: object, types: object, args: object = (), kwargs: object = None
    ) -> None:
        raise AssertionError(f"{func} was called")


def test_switching_computes_copies_and_asks_for_nothing() -> None:
    levels = nested()
    serve = Runtime(levels, X)
    slowest = max(each.latency_ms for each in serve.costs)
    storages = [p.data_ptr() for level in levels for p in level.parameters()]
    with NoWork():
        for each in serve.costs:
            serve.within(memory_mb=each.memory_mb)
            assert serve.levels[serve.level] is levels[serve.level]
            serve.within(latency_ms=slowest)
            serve.observe(serve.level, 10 * slowest)
    assert [p.data_ptr() for level in levels for p in level.parameters()] == storages


def test_a_deadline_may_go_while_a_request_is_answered() -> None:
    serve = served()
    serve.within(latency_ms=5)

    class Lock:
        """Another thread was there first."""

        def __enter__(self) -> None:
            serve.deadline_ms = None

        def __exit__(self, *_: object) -> None:
            pass

    serve._lock = Lock()  # type: ignore[assignment]
    serve.observe(serve.level, 100.0)
    assert serve.slowdown == 1.0


def test_threads_get_the_answer_of_one_level_each() -> None:
    """Requests overlap with switches: every answer is one that some level gives, to the last bit."""
    levels = nested()
    serve = Runtime(levels, X)
    x = torch.randn(1, 1, 8, 8)
    with torch.inference_mode():
        right = [level(x) for level in levels]
    wrong: list[torch.Tensor] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answer = serve(x)
            if not any(torch.equal(answer, known) for known in right):
                wrong.append(answer)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for k in range(600):
        serve.level = k % 3
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_that_of_the_level_not_of_its_storage() -> None:
    levels = nested()
    sizes = [measure_memory_mb(level, X) for level in levels]
    for level, size in zip(levels, sizes, strict=True):
        held = 4 * sum(p.numel() for p in level.parameters())
        held += sum(b.numel() * b.element_size() for b in level.buffers())
        first: nn.Conv2d = level[0]  # type: ignore[index,assignment]
        moved = 4 * 64 * 2 * first.out_channels  # what a norm at full resolution reads and writes
        assert size == pytest.approx((held + moved) / 1e6)
    assert sizes == sorted(sizes)


def test_latency_is_measured_in_evaluation_mode_and_leaves_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now) / 1000)  # each look takes 1 ms
    net = convnet().train()
    seen: list[bool] = []
    net.register_forward_hook(lambda m, x, y: seen.append(m.training))
    assert measure_latency_ms(net, X) == pytest.approx(1.0)
    assert net.training and not any(seen)


def test_energy_comes_from_the_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter((10.0, 10.33))
    assert machine.measure_cost(convnet(), X, lambda: next(counter)).energy_mj == pytest.approx(
        10.0
    )  # of 33 passes
    monkeypatch.setattr(machine, "RAPL", tmp_path / "energy_uj")
    with pytest.raises(FileError, match="cannot be read: give another counter"):
        read_rapl_joules()
    (tmp_path / "energy_uj").write_text("2500000\n")
    assert read_rapl_joules() == 2.5
