"""Levels at run time: what each of them costs on this machine, and which one to use now.

Calibration measures each level once; from then on the time that requests really take says how much slower
the machine has become, and the largest level that is still expected to meet the deadline runs the next one.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.measure.machine import measure_cost


class Runtime:
    """Runs the largest level that meets a deadline on this machine as it is now.

    Call it like a network. Several threads may; each request runs on one level from its begin to its end.

    Args:
        levels: modules for the same input, smallest first: `elastic.nested.Levels`, or `extract` of each.
        example: an input like those to come; its batch size matters.
        joules: reads a counter of energy, see `rapl_joules`; needed for budgets of energy only.
        smoothing: weight of the latest request in the running mean of the slow-down. One that was late and
            slower than the mean is the mean: a missed deadline costs more than some answers of a small level.
        headroom: a larger level must be expected to take at most this part of the deadline …
        patience: … at so many requests in a row, before it is used. A smaller one is used at once.

    Attributes:
        level: what the next request runs on.
        slowdown: time that requests take now, relative to calibration.

    Example::

        serve = Runtime(levels, example)
        serve.within(latency_ms=5)
        logits_BK = serve(x_BCHW)
    """

    def __init__(
        self,
        levels: Sequence[nn.Module],
        example: Tensor,
        *,
        joules: Callable[[], float] | None = None,
        smoothing: float = 0.3,
        headroom: float = 0.8,
        patience: int = 8,
    ) -> None:
        self.levels = list(levels)
        for level in self.levels:
            level.eval()
        self.costs = [measure_cost(level, example, joules) for level in self.levels]
        self.smoothing, self.headroom, self.patience = smoothing, headroom, patience
        self.allowed = self.level = len(self.levels) - 1
        self.deadline_ms: float | None = None
        self.slowdown, self._calm = 1.0, 0
        self._lock = threading.Lock()

    def within(self, **budgets: float) -> int:
        """Use the largest level within all budgets (latency_ms, memory_mb, energy_mj); returns it.

        No data is needed and nothing is copied. A deadline is watched from here on.

        Raises:
            StructureError: no level is within them, or the machine does not tell its energy.
        """
        fits = len(self.levels) - 1
        for name, budget in budgets.items():
            taken = [asdict(each)[name] for each in self.costs if asdict(each).get(name) is not None]
            if not taken:
                why = "there is no energy counter" if name == "energy_mj" else "there is no such budget"
                raise StructureError(f"{name} cannot be budgeted: {why}; use latency_ms or memory_mb")
            met = [k for k, used in enumerate(taken) if used <= budget]
            if not met:
                least = f"the smallest takes {taken[0]:.3g}"
                raise StructureError(f"no level is within {name}={budget:g}: {least}")
            fits = min(fits, max(met))
        with self._lock:
            self.deadline_ms = budgets.get("latency_ms")
            self.allowed = fits if set(budgets) - {"latency_ms"} else len(self.levels) - 1
            self.level, self.slowdown, self._calm = fits, 1.0, 0
        return fits

    @torch.inference_mode()
    def __call__(self, x_BCHW: Tensor) -> Tensor:
        k = self.level
        start = time.perf_counter()
        out: Tensor = self.levels[k](x_BCHW)
        self.observe(k, 1e3 * (time.perf_counter() - start))
        return out

    def observe(self, k: int, took_ms: float) -> None:
        """Level k has taken so long: choose the level of the next request."""
        if self.deadline_ms is None:
            return
        with self._lock:
            seen = took_ms / self.costs[k].latency_ms
            late = took_ms > self.deadline_ms and seen > self.slowdown
            self.slowdown += (1.0 if late else self.smoothing) * (seen - self.slowdown)
            fits = self._largest(self.deadline_ms)
            roomy = self._largest(self.headroom * self.deadline_ms)
            self._calm = self._calm + 1 if roomy > self.level else 0
            if fits < self.level:
                self.level = fits
            elif self._calm >= self.patience:
                self.level, self._calm = roomy, 0

    def _largest(self, deadline_ms: float) -> int:
        """The largest level expected to meet the deadline now; the smallest if none is."""
        met = [k for k, c in enumerate(self.costs) if c.latency_ms * self.slowdown <= deadline_ms]
        return min(self.allowed, max(met, default=0))
