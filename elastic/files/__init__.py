"""Keep what a run leaves, and write it for other programs."""

from elastic.files.exporting import export
from elastic.files.network import Network, load, save

__all__ = ["Network", "export", "load", "save"]
