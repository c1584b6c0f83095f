"""Elastic CNNs: networks that change size while they train and while they run. This much needs torch alone.

`elastic.callbacks` has the Lightning callbacks.
"""

from pathlib import Path

from elastic.dynamic import attach_modules, make_skipping
from elastic.errors import ElasticError
from elastic.growth import Growth, Periodic, Plateau
from elastic.levels import Levels, Runtime, level_sizes
from elastic.measure import census
from elastic.pruning import Budget, attach_gates, compact
from elastic.surgery import deepen, grow_index, reindex
from elastic.widths import Width, Widths, discover, register_op

__all__ = [
    "Budget",
    "ElasticError",
    "Growth",
    "Levels",
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
    "grow_index",
    "level_sizes",
    "make_skipping",
    "register_op",
    "reindex",
]

# Installed, callbacks/, conf/ and experiments/ are sub-packages of this one; in a checkout they are siblings.
_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))
