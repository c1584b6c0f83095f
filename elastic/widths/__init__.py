"""Find what may change: the channel axes of any CNN; `register_op` teaches an operation of one's own."""

from elastic.widths.discovery import discover, find_widths
from elastic.widths.operations import Axes, NotFollowed, Rule, Tracker, register_op
from elastic.widths.parameters import ChannelParametrization
from elastic.widths.width import Segment, Slot, Width, Widths

__all__ = [
    "Axes",
    "ChannelParametrization",
    "NotFollowed",
    "Rule",
    "Segment",
    "Slot",
    "Tracker",
    "Width",
    "Widths",
    "discover",
    "find_widths",
    "register_op",
]
