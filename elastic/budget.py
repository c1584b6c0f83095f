"""A controller that steers the gates' penalty so that a run ends with the parameters asked for."""

from dataclasses import dataclass
from math import exp, log

from elastic.errors import StructureError


@dataclass
class Budget:
    """Multiplies λ up while the network is above its path to the budget, down while it is below.

    The path falls from (1 + headroom) times the budget to the budget at `end`, on a cubic curve: early on
    there is room to learn and to grow. The error counts where the network is heading (`damping` times the
    last change is added), since gates answer late.

    Args:
        asked: parameters (or MACs) wanted.
        end: part of the run after which the budget should hold.
        gain: change of log λ for an error of one e-fold.
    """

    asked: int
    end: float = 0.7
    headroom: float = 3.0
    gain: float = 0.05
    damping: float = 10.0
    least: float = 1e-8
    most: float = 1e-1
    last: float | None = None

    def __post_init__(self) -> None:
        if self.asked < 1:
            raise StructureError(f"a budget of {self.asked} cannot be met: ask for at least 1")
        if not 0 < self.end <= 1:
            raise StructureError(f"the budget's end is {self.end}: set it above 0, to 1 at most")

    def path(self, progress: float) -> float:
        """The size wanted at this part of the run (0 … 1)."""
        left = max(0.0, 1 - progress / self.end)
        return self.asked * (1 + self.headroom * left**3)

    def steer(self, weight: float, now: float, progress: float) -> float:
        """The next λ, from the present one and the present size."""
        now = max(now, 1.0)
        trend = 0.0 if self.last is None else log(now / self.last)
        self.last = now
        error = log(now / self.path(progress)) + self.damping * trend
        step = self.gain * max(-1.0, min(1.0, error))
        return min(self.most, max(self.least, weight * exp(step)))
