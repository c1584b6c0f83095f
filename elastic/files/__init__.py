"""Keep what a run leaves, and write it for other programs."""

from elastic.files.exporting import export, open_exported
from elastic.files.network import Network, load, save

__all__ = ["Network", "export", "load", "open_exported", "save"]
