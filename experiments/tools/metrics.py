"""Name the figure that a run is judged by, and say how it is shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEST = "test/"
ACCURACY = "test/acc"
SHARES = ("acc", "f1", "iou")  # parts of 1, shown in percent


@dataclass(frozen=True)
class ShownMetric:
    """Hold how a metric is shown.

    Attributes:
        key: of a summary.
        name: in full.
        is_share: whether it is a part of 1, shown in percent.
    """

    key: str
    name: str
    is_share: bool

    @property
    def scale(self) -> float:
        """Return what values are multiplied by."""
        return 100.0 if self.is_share else 1.0

    @property
    def digits(self) -> int:
        """Return how many digits behind the point say something."""
        return 2 if self.is_share else 4

    @property
    def unit(self) -> str:
        """Return what stands behind a value."""
        return " %" if self.is_share else ""

    @property
    def head(self) -> str:
        """Return the head of a column."""
        return self.key.replace("/", " ") + (" (%)" if self.is_share else "")

    @property
    def label(self) -> str:
        """Return the label of an axis."""
        return self.name + (" (%)" if self.is_share else "")

    def format(self, value: float) -> str:
        """Write a value."""
        return f"{self.scale * value:.{self.digits}f}" + ("%" if self.is_share else "")


def find_metric(summary: Mapping[str, Any]) -> str:
    """Find the key of the metric that a summary is judged by: the first one of the test split.

    Raises:
        KeyError: it has none.
    """
    key = next((key for key in summary if key.startswith(TEST)), None)
    if key is None:
        raise KeyError(ACCURACY)
    return key


def describe_metric(key: str) -> ShownMetric:
    """Describe how a metric is shown."""
    name = key.removeprefix(TEST)
    return ShownMetric(key, f"test {'accuracy' if name == 'acc' else name}", name in SHARES)


def list_shown(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the metrics of a summary, or of one of its levels, by name and as text."""
    shown = [describe_metric(key) for key in row if key.startswith(TEST)]
    return [(metric.name, metric.format(row[metric.key])) for metric in shown]
