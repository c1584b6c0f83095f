"""Solve for the sizes of widths whose channels lie side by side: of each tensor only their sum is known."""

from collections.abc import Mapping, Sequence

import numpy as np

from elastic.widths.operations.interface import is_stored
from elastic.widths.width import Segment, Widths

Layout = tuple[Segment, ...]
NOTHING = 1e-8  # what rounding leaves of a zero


def list_layouts(widths: Widths, names: Sequence[str]) -> list[Layout]:
    """List how channels lie on the tensors on which those of some widths do."""
    slots = (slot for name in names for slot in widths[name].slots if is_stored(slot.tensor))
    return list(dict.fromkeys(slot.layout for slot in slots))


def find_spans(names: Sequence[str], layouts: Sequence[Layout]) -> list[str]:
    """Find the widths whose sizes the sums leave open: one could grow as others shrink."""
    _, values, directions = np.linalg.svd(_count_repeats(names, layouts))
    rank = int((values > NOTHING).sum())
    is_open = (np.abs(directions[rank:]) > NOTHING).any(0)
    return [name for name, opens in zip(names, is_open.tolist(), strict=True) if opens]


def solve_sizes(
    names: Sequence[str], extents: Mapping[Layout, int], known: Mapping[str, int]
) -> dict[str, int]:
    """Solve for sizes, given how long each dimension is and the sizes of all other widths.

    Returns:
        nothing where the sums leave sizes open.
    """
    if find_spans(names, list(extents)):
        return {}
    others = [
        sum(s.repeat * (1 if s.width is None else known[s.width]) for s in layout if s.width not in names)
        for layout in extents
    ]
    sums = np.array(list(extents.values())) - np.array(others)
    sizes, *_ = np.linalg.lstsq(_count_repeats(names, list(extents)), sums, rcond=None)
    return {name: max(1, round(size)) for name, size in zip(names, sizes.tolist(), strict=True)}


def _count_repeats(names: Sequence[str], layouts: Sequence[Layout]) -> np.ndarray:
    """Count how often each layout has the channels of each width: (layouts, widths)."""
    columns = {name: i for i, name in enumerate(names)}
    repeats = np.zeros((len(layouts), len(names)))
    for row, layout in zip(repeats, layouts, strict=True):
        for segment in layout:
            if segment.width in columns:
                row[columns[segment.width]] += segment.repeat
    return repeats
