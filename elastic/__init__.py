"""Elastic CNNs: networks whose widths change while they train. This much needs torch alone."""

from elastic.errors import StructureError
from elastic.surgery import grow_index, reindex
from elastic.widths import Width, Widths, discover

__all__ = ["StructureError", "Width", "Widths", "discover", "grow_index", "reindex"]
