"""When to grow, which widths, and how far: pure decisions, no model in sight."""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, Literal, Protocol

from elastic.errors import StructureError


class Trigger(Protocol):
    """Decides from one value an epoch whether the network should grow now.

    Where it looks at something else than the value, an attribute `why` tells the timeline.
    """

    def observe(self, value: float) -> bool: ...


@dataclass
class Plateau:
    """Fires when a metric has not gained `min_gain` over its best for `patience` observations.

    The best survives growth, the count starts anew: a grown network gets `patience` epochs to beat it.
    """

    patience: int = 3
    min_gain: float = 0.002
    mode: Literal["max", "min"] = "max"
    best: float | None = None
    waited: int = 0

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise StructureError(f"patience is {self.patience}: a plateau needs at least 1 epoch to be seen")
        if self.mode not in ("max", "min"):
            raise StructureError(f"mode is '{self.mode}': set it to max or min")

    def observe(self, value: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        if isfinite(value) and (self.best is None or sign * (value - self.best) >= self.min_gain):
            self.best, self.waited = value, 0
            return False
        self.waited += 1
        if self.waited < self.patience:
            return False
        self.waited = 0
        return True


@dataclass
class Periodic:
    """Fires at every n-th observation, whatever the value: the control for `Plateau`."""

    every: int = 5
    seen: int = 0
    why: ClassVar[str] = "by the clock"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise StructureError(f"every is {self.every}: set it to 1 epoch or more")

    def observe(self, value: float) -> bool:
        self.seen += 1
        return self.seen % self.every == 0
