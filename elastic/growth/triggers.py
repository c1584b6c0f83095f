"""Decide when to grow, from one value an epoch; no model is in sight."""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, Literal, Protocol

from elastic.errors import OptionError
from elastic.ranges import Count, NotNegative, checked


class Trigger(Protocol):
    """Decide from one value an epoch whether the network should grow now.

    A trigger that looks at something else than the value says so in an attribute `reason`, for the timeline;
    one that ignores the value altogether has `ignores_value`, so that none has to be there.
    """

    def observe(self, value: float) -> bool: ...


@checked
@dataclass
class Plateau:
    """Fire when a metric has not gained `min_gain` over its best for `patience` observations.

    The best survives growth, the count starts anew: a grown network gets `patience` epochs to beat it.
    """

    patience: Count = 3
    min_gain: NotNegative = 0.002
    mode: Literal["max", "min"] = "max"
    best: float | None = None
    epochs_without_gain: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise OptionError(f"mode is '{self.mode}': set it to max or min")

    def observe(self, value: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        if isfinite(value) and (self.best is None or sign * (value - self.best) >= self.min_gain):
            self.best, self.epochs_without_gain = value, 0
            return False
        self.epochs_without_gain += 1
        if self.epochs_without_gain < self.patience:
            return False
        self.epochs_without_gain = 0
        return True


@checked
@dataclass
class Periodic:
    """Fire at every n-th observation, whatever the value: the control for `Plateau`."""

    every: Count = 5
    observations: int = 0
    reason: ClassVar[str] = "by the clock"
    ignores_value: ClassVar[bool] = True

    def observe(self, value: float) -> bool:
        self.observations += 1
        return self.observations % self.every == 0
