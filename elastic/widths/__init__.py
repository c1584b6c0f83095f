"""What may change: the channel axes of any CNN, and how they are found."""

from elastic.widths.discovery import Segment, Slot, Width, Widths, discover, find_widths
from elastic.widths.parameters import ChannelParametrization

__all__ = ["ChannelParametrization", "Segment", "Slot", "Width", "Widths", "discover", "find_widths"]
