"""Steer the gates' penalty so that a run ends with the parameters, or MACs, of its budget."""

from dataclasses import dataclass
from math import exp, log

from elastic.errors import OptionError
from elastic.ranges import Part, checked

# The controller's constants, from a closed loop with plants that stand for a network's gates (see its tests):
# runs of 3,000 looks land within 5 % of budgets from a twentieth to three quarters of the network.
RATE = 100.0  # change of log λ over a whole run for an error of one e-fold
DAMPING = 10.0  # times the last change of log size: gates answer late, so what counts is where they head for
LEAST, MOST = 1e-8, 1e-1  # bounds of λ: what no λ reaches must not make it run away


@checked
@dataclass
class Budget:
    """Multiply λ up while the network is above its path to the budget, down while it is below.

    The path falls on a cubic curve from the largest size seen to the budget at `end`. It begins where that
    size was reached, or at `begin` if that is later: what has grown gets time to learn.

    Args:
        target: parameters wanted, or MACs.
        begin, end: parts of the run between which the path falls; after `end` the budget should hold.
        peak, since: the largest size seen, and the part of the run at which it was reached.
        last, last_progress: of the latest look.
    """

    target: int
    begin: Part = 0.0
    end: Part = 0.7
    peak: float = 0.0
    since: float = 0.0
    last: float | None = None
    last_progress: float = 0.0

    def __post_init__(self) -> None:
        self.target = read_target(self.target)
        if not 0 <= self.begin < self.end <= 1:
            raise OptionError(
                f"the budget's path falls from {self.begin} to {self.end} of the run: set 0 ≤ begin < end ≤ 1"
            )

    def path(self, progress: float) -> float:
        """Compute the size wanted at this part of the run (0 … 1)."""
        above = max(0.0, self.peak - self.target)
        begin = max(self.begin, self.since)
        remaining = (self.end - progress) / (self.end - begin) if begin < self.end else 0.0
        return self.target + above * min(1.0, max(0.0, remaining)) ** 3

    def steer(self, penalty: float, size: float, progress: float) -> float:
        """Compute the next λ, from the present one and the present size."""
        size = max(size, 1.0)
        if size > self.peak:
            self.peak, self.since = size, progress
        trend = 0.0 if self.last is None else log(size / self.last)
        elapsed = max(0.0, progress - self.last_progress)
        self.last, self.last_progress = size, progress
        if self.peak <= self.target:  # nothing to shut yet: λ waits for what grows
            return penalty
        error = log(size / self.path(progress)) + DAMPING * trend
        step = RATE * elapsed * max(-1.0, min(1.0, error))
        return min(MOST, max(LEAST, penalty * exp(step)))


def read_target(value: int | float | str) -> int:
    """Read a budget as a whole number, which may be written as 2e3 or "2e3".

    Raises:
        OptionError: anything else.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if value is True or not (number >= 1 and number.is_integer()):
        raise OptionError(f"a budget of {value} cannot be met: set it to a whole number, 1 or more")
    return int(number)
