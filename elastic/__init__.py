"""Change the size of CNNs while they train and while they run. This much needs torch alone.

`elastic.callbacks` has the Lightning callbacks.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.dynamic import attach_modules, make_skipping
from elastic.errors import ElasticError
from elastic.growth import Growth, Periodic, Plateau
from elastic.levels import Levels, Runtime, level_sizes
from elastic.measure import census
from elastic.pruning import Budget, attach_gates, compact
from elastic.surgery import deepen, grow_index, reindex
from elastic.widths import Width, Widths, discover, register_op

if TYPE_CHECKING:
    from elastic.files import Network, export, load, save

__all__ = [
    "Budget",
    "ElasticError",
    "Growth",
    "Levels",
    "Network",
    "Periodic",
    "Plateau",
    "Runtime",
    "Width",
    "Widths",
    "attach_gates",
    "attach_modules",
    "census",
    "compact",
    "deepen",
    "discover",
    "export",
    "grow_index",
    "level_sizes",
    "load",
    "make_skipping",
    "register_op",
    "reindex",
    "save",
]

_FILES = ("Network", "export", "load", "save")  # these need more than torch, so they come when asked for


def __getattr__(name: str) -> Any:
    """Import what needs more than torch when it is first asked for."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("elastic.files"), name)


# Installed, callbacks/, conf/ and experiments/ are sub-packages of this one; in a checkout they are siblings.
_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))
