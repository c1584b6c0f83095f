"""Follow channels that a weight reads and writes, whoever applies it."""

import numpy as np
from torch import fx

from elastic.widths.operations.interface import Place, Tracker
from elastic.widths.union import Axis

SPACE = "works on channels as if they were space"


def read_and_write(
    tracker: Tracker,
    node: fx.Node,
    source: Axis | None,
    weight: Place,
    bias: Place | None,
    groups: int = 1,
    is_depthwise: bool = False,
) -> Axis:
    """Let a weight (out, in / groups, …) read channels and write others; give the axis that it writes.

    Where it is depthwise, each channel is a group, and gives a run of as many outputs.
    """
    written = tracker.begin(*weight, "depthwise" if is_depthwise else "out")
    if is_depthwise:
        tracker.unite(written, None if source is None else np.repeat(source, len(written) // groups), node)
    else:
        if groups > 1:
            tracker.elements.tie(written, groups)
            source = None if source is None else tracker.elements.tie(source, groups)
        tracker.record(*weight, 1, "in", source)
    if bias is not None:
        tracker.record(*bias, 0, "per_channel", written)
    return written
