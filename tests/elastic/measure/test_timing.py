"""Timing: networks take turns, and the median decides."""

import time

import pytest
import torch
from torch import Tensor

from elastic.measure.timing import Network, choose_fastest, measure_medians_ms, measure_times_ms


def test_networks_take_turns_and_each_has_inputs_of_its_own() -> None:
    seen: list[tuple[str, float]] = []

    def network(name: str, pause_s: float) -> Network:
        def call(x: Tensor) -> None:
            seen.append((name, float(x)))
            time.sleep(pause_s)

        return call

    inputs = [[torch.tensor(1.0), torch.tensor(2.0)], [torch.tensor(3.0), torch.tensor(4.0)]]
    fast, slow = measure_times_ms([network("fast", 0), network("slow", 0.02)], inputs)
    assert seen == [("fast", 1.0), ("slow", 3.0)] * 3 + [
        ("fast", 1.0),
        ("slow", 3.0),
        ("fast", 2.0),
        ("slow", 4.0),
    ]
    assert len(fast) == len(slow) == 2 and min(slow) >= 20 > min(fast)
    assert measure_medians_ms([network("slow", 0.02)], inputs[0])[0] >= 20


def test_the_fastest_network_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median counts: one slow call is an accident."""
    clock = {"now": 0.0}
    calls = {"steady": 0, "shaken": 0}

    def network(name: str, times: list[float]) -> Network:
        def run(x: Tensor) -> Tensor:
            clock["now"] += times[calls[name] % len(times)]
            calls[name] += 1
            return x

        return run

    steady, shaken = network("steady", [2.0]), network("shaken", [1.0, 9.0, 1.0])
    monkeypatch.setattr("elastic.measure.timing.time.perf_counter", lambda: clock["now"])
    assert choose_fastest([steady, shaken], [torch.zeros(1), torch.zeros(1)]) is shaken
    assert choose_fastest([shaken, steady], [torch.zeros(1)]) is shaken
    assert choose_fastest([steady, network("shaken", [3.0])], [torch.zeros(1)]) is steady
