"""Decide how far one growth goes, and where; no model is in sight."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor
from typing import Annotated

from elastic.ranges import Count, Natural, Range, checked


@checked
@dataclass(frozen=True)
class Growth:
    """Say how far one growth goes: every width that has room grows, and stages may gain blocks.

    Args:
        factor: of the channels of each width, rounded up, at least one channel.
        ceiling: channels that no width passes, as a multiple of its first size.
        multiple: sizes are rounded up to it (odd channel counts can be slower than the next even one).
        blocks: residual blocks that each stage may gain, one at a time; 0 for growth in width alone, and
            with a ceiling of 1 for growth in depth alone.
    """

    factor: Annotated[float, Range(1, 1000, above=True)] = 1.5
    ceiling: Annotated[float, Range(1, 1000)] = 4.0
    multiple: Count = 1
    blocks: Natural = 0

    def propose(self, sizes: Mapping[str, int], start: Mapping[str, int]) -> dict[str, int]:
        """Give the new size of each width that grows; empty where all have reached their ceiling."""
        # Rounded: 1.1 × 50 is 55, though floating point says 55.00000000000001.
        limits = {name: floor(round(self.ceiling * start[name], 6)) for name in sizes}
        return {
            name: min(limits[name], self._enlarge(size))
            for name, size in sizes.items()
            if size < limits[name]
        }

    def deepen(self, depth: Mapping[str, int], start: Mapping[str, int]) -> list[str]:
        """List the stages that gain a block."""
        return [stage for stage in depth if depth[stage] - start[stage] < self.blocks]

    def _enlarge(self, size: int) -> int:
        larger = max(size + 1, round(size * self.factor, 6))
        return ceil(larger / self.multiple) * self.multiple
