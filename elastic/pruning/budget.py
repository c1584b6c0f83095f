"""A controller that steers the gates' penalty so that a run ends with the parameters asked for."""

from dataclasses import dataclass
from math import exp, isfinite, log

from elastic.errors import StructureError


@dataclass
class Budget:
    """Multiplies λ up while the network is above its path to the budget, down while it is below.

    The path falls on a cubic curve from the largest size seen, or (1 + headroom) times the budget where
    that is less, at `begin`, to the budget at `end`: early on there is room to learn and to grow. What
    counts is where the network is heading (`damping` times the last change is added), since gates answer
    late.

    Args:
        target: parameters wanted.
        begin, end: parts of the run between which the path falls; after `end` the budget should hold.
        rate: change of log λ over a whole run for an error of one e-fold.
    """

    target: int
    begin: float = 0.0
    end: float = 0.7
    headroom: float = 3.0
    rate: float = 100.0
    damping: float = 10.0
    least: float = 1e-8
    most: float = 1e-1
    peak: float = 0.0
    last: float | None = None
    last_progress: float = 0.0

    def __post_init__(self) -> None:
        if not (isfinite(self.target) and self.target >= 1 and self.target == int(self.target)):
            raise StructureError(
                f"a budget of {self.target} cannot be met: ask for a whole number, at least 1"
            )
        self.target = int(self.target)  # 2e3 is a whole number, too
        if not 0 <= self.begin < self.end <= 1:
            raise StructureError(
                f"the budget's path falls from {self.begin} to {self.end} of the run: set 0 ≤ begin < end ≤ 1"
            )
        if self.headroom < 0 or not (isfinite(self.rate) and self.rate > 0) or self.least > self.most:
            raise StructureError(
                f"the budget's headroom {self.headroom}, rate {self.rate} or least {self.least} is off: "
                f"set headroom to 0 or more, rate above 0, least to {self.most} at most"
            )

    def path(self, progress: float) -> float:
        """The size wanted at this part of the run (0 … 1)."""
        above = max(0.0, min(self.headroom * self.target, self.peak - self.target))
        left = (self.end - progress) / (self.end - self.begin)
        return self.target + above * min(1.0, max(0.0, left)) ** 3

    def steer(self, weight: float, now: float, progress: float) -> float:
        """The next λ, from the present one and the present size."""
        now = max(now, 1.0)
        self.peak = max(self.peak, now)
        trend = 0.0 if self.last is None else log(now / self.last)
        elapsed = max(0.0, progress - self.last_progress)
        self.last, self.last_progress = now, progress
        error = log(now / self.path(progress)) + self.damping * trend
        step = self.rate * elapsed * max(-1.0, min(1.0, error))
        return min(self.most, max(self.least, weight * exp(step)))
