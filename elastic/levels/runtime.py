"""Run levels: measure what each of them costs on this machine, and choose which one to use now.

Calibration measures each level once; from then on the time that requests really take says how much slower
the machine has become, and the largest level that is still expected to meet the deadline runs the next one.
A level from `make_alone` that turns out to be late is stopped, and a smaller one answers.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from elastic.errors import OptionError
from elastic.levels.deadline import Late, stop_when_late
from elastic.measure.machine import measure_cost
from elastic.widths.inputs import Example, count_batch, list_inputs

# The weight of the latest request in the running mean of the slow-down. One that was late and slower than the
# mean is the mean: a missed deadline costs more than some answers of a small level.
SMOOTHING = 0.3
# A larger level must be expected to take at most this part of the deadline …
HEADROOM = 0.9
# … at so many requests in a row, before it is used. A smaller one is used at once.
PATIENCE = 8


class Runtime:
    """Run the largest level that meets a deadline on this machine as it is now.

    Call it like a network. Several threads may; each request runs on one level from its begin to its end.

    Args:
        levels: modules for the same input, smallest first: `Levels`, or `make_alone` of each, where there is
            memory for all.
        example: an input like those to come, or several; their batch size matters.
        joules: reads a counter of energy, see `read_rapl_joules`; needed for budgets of energy only.

    Attributes:
        batch: inputs of a request, at calibration.
        level: what the next request runs on.
        slowdown: time that requests take now, relative to calibration.

    Raises:
        OptionError: there is no level.

    Example::

        serve = Runtime(levels, example)
        serve.within(latency_ms=5)
        logits_BK = serve(x_BCHW)
    """

    def __init__(
        self, levels: Sequence[nn.Module], example: Example, *, joules: Callable[[], float] | None = None
    ) -> None:
        self.levels = list(levels)
        if not self.levels:
            raise OptionError("there is no level to run: give one or more, smallest first")
        for level in self.levels:
            level.eval()
        self.batch = count_batch(example)
        self.costs = [measure_cost(level, example, joules) for level in self.levels]
        self.allowed = self.level = len(self.levels) - 1
        self.deadline_ms: float | None = None
        self.slowdown = 1.0
        self._roomy_requests = 0  # in a row, with room for a larger level
        self._lock = threading.Lock()

    def within(self, **budgets: float) -> int:
        """Use the largest level within all budgets (latency_ms, memory_mb, energy_mj), and return it.

        No data is needed and nothing is copied. A deadline is watched from here on.

        Raises:
            OptionError: no level is within them, or the machine does not tell its energy.
        """
        top = len(self.levels) - 1
        k = min((self._find_largest(name, budget) for name, budget in budgets.items()), default=top)
        with self._lock:
            self.deadline_ms = budgets.get("latency_ms")
            self.allowed = k if set(budgets) - {"latency_ms"} else top
            self.level, self.slowdown, self._roomy_requests = k, 1.0, 0
        return k

    def _find_largest(self, name: str, budget: float) -> int:
        """Find the largest level within one budget."""
        costs = [cost for cost in (asdict(costs).get(name) for costs in self.costs) if cost is not None]
        if not costs:
            reason = "there is no energy counter" if name == "energy_mj" else "there is no such budget"
            raise OptionError(f"{name} cannot be budgeted: {reason}; use latency_ms or memory_mb")
        levels = [k for k, cost in enumerate(costs) if cost <= budget]
        if not levels:
            raise OptionError(f"no level is within {name}={budget:g}: the smallest takes {costs[0]:.3g}")
        return max(levels)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.answer(inputs)[0]

    @torch.inference_mode()
    def answer(self, x: Example, left_ms: float | None = None) -> tuple[Tensor, int]:
        """Run a level, and return its output and which it was.

        Args:
            x: an input, batch first, or several.
            left_ms: of the deadline, for a request that has waited, and that nobody wants too late.

        Raises:
            Late: with `left_ms`, not even the smallest level is expected to be in time.
        """
        inputs = list_inputs(x)
        self._give_up(left_ms)
        deadline_ms = self.deadline_ms if left_ms is None else left_ms
        k = self.level if deadline_ms is None else min(self.level, self._expect_largest(deadline_ms))
        begin = start = time.perf_counter()
        try:
            with stop_when_late(deadline_ms if k > 0 else None):
                out: Tensor = self.levels[k](*inputs)
        except Late as late:
            self.observe(k, late.expected_ms)
            start = time.perf_counter()
            elapsed_ms = 1e3 * (start - begin)
            self._give_up(None if left_ms is None else left_ms - elapsed_ms)
            k = min(k - 1, self._expect_largest((deadline_ms or 0.0) - elapsed_ms))
            out = self.levels[k](*inputs)
        self.observe(k, 1e3 * (time.perf_counter() - start))
        return out, k

    def _give_up(self, left_ms: float | None) -> None:
        """Give a request up that cannot be in time: the work would make the next ones late, too."""
        expected_ms = self.costs[0].latency_ms * self.slowdown
        if left_ms is None or expected_ms <= left_ms:
            return
        with self._lock:
            self.slowdown += SMOOTHING * (1.0 - self.slowdown)  # or no request would ever be tried again
        raise Late(expected_ms)

    def observe(self, k: int, latency_ms: float) -> None:
        """Observe how long level k has taken, and choose the level of the next request."""
        with self._lock:
            if self.deadline_ms is None:
                return
            slowdown = latency_ms / self.costs[k].latency_ms
            is_late = latency_ms > self.deadline_ms and slowdown > self.slowdown
            self.slowdown += (1.0 if is_late else SMOOTHING) * (slowdown - self.slowdown)
            largest = self._expect_largest(self.deadline_ms)
            with_room = self._expect_largest(HEADROOM * self.deadline_ms)
            self._roomy_requests = self._roomy_requests + 1 if with_room > self.level else 0
            if largest < self.level:
                self.level = largest
            elif self._roomy_requests >= PATIENCE:
                self.level, self._roomy_requests = with_room, 0

    def _expect_largest(self, deadline_ms: float) -> int:
        """Find the largest level expected to meet a deadline now; the smallest if none is."""
        on_time = [k for k, cost in enumerate(self.costs) if cost.latency_ms * self.slowdown <= deadline_ms]
        return min(self.allowed, max(on_time, default=0))
