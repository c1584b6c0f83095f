"""How far one growth goes, and where: a pure decision, no model in sight."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor, isfinite

from elastic.errors import StructureError


@dataclass(frozen=True)
class Growth:
    """How far one growth goes, and where.

    Args:
        factor: of the channels of each width that grows, rounded up, at least one channel.
        ceiling: channels that no width passes, as a multiple of its first size.
        share: of the widths that grow at a time, those whose gates are fullest first; 1 for all of them.
        multiple: sizes are rounded up to it (odd channel counts can be slower than the next even one).
        blocks: residual blocks that each stage may gain, one at a time; 0 for growth in width alone, and
            with a ceiling of 1 for growth in depth alone.
    """

    factor: float = 1.5
    ceiling: float = 4.0
    share: float = 1.0
    multiple: int = 1
    blocks: int = 0

    def __post_init__(self) -> None:
        if not (isfinite(self.factor) and self.factor > 1):
            raise StructureError(f"growth factor is {self.factor}: set it above 1")
        if not self.ceiling >= 1:
            raise StructureError(f"growth ceiling is {self.ceiling} times the start: set it to 1 or more")
        if not 0 < self.share <= 1:
            raise StructureError(f"growth share is {self.share}: set it above 0, to 1 at most")
        if self.multiple < 1:
            raise StructureError(f"growth rounds to a multiple of {self.multiple}: set it to 1 or more")
        if self.blocks < 0:
            raise StructureError(f"growth adds {self.blocks} blocks: set it to 0 or more")

    def propose(
        self, sizes: Mapping[str, int], start: Mapping[str, int], fullness: Mapping[str, float]
    ) -> dict[str, int]:
        """The new size of each width that grows; empty where all have reached their ceiling."""
        ends = {name: floor(round(self.ceiling * start[name], 6)) for name in sizes}
        room = [name for name in sizes if sizes[name] < ends[name]]
        chosen = sorted(room, key=lambda name: -fullness[name])[: ceil(round(self.share * len(sizes), 6))]
        return {name: min(ends[name], self._next(sizes[name])) for name in sizes if name in chosen}

    def deepen(self, depth: Mapping[str, int], start: Mapping[str, int]) -> list[str]:
        """The stages that gain a block."""
        return [stage for stage in depth if depth[stage] - start[stage] < self.blocks]

    def _next(self, size: int) -> int:
        return ceil(max(size + 1, round(size * self.factor, 6)) / self.multiple) * self.multiple
