"""Change the size of CNNs while they train and while they run. This much needs torch and NumPy alone.

`elastic.callbacks` has the Lightning callbacks.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic.dynamic import attach_modules, make_skipping
    from elastic.errors import ElasticError
    from elastic.files import Network, export, load, save
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

# Imported when first asked for: a command line answers before torch is there, files need more than torch.
_ROOMS = {
    "dynamic": ("attach_modules", "make_skipping"),
    "errors": ("ElasticError",),
    "files": ("Network", "export", "load", "save"),
    "growth": ("Growth", "Periodic", "Plateau"),
    "levels": ("Levels", "Runtime", "level_sizes"),
    "measure": ("census",),
    "pruning": ("Budget", "attach_gates", "compact"),
    "surgery": ("deepen", "grow_index", "reindex"),
    "widths": ("Width", "Widths", "discover", "register_op"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name from its room when it is first asked for."""
    if name == "__version__":
        return _find_version()
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"elastic.{_ROOM_OF[name]}"), name)
    return value


def _find_version() -> str:
    """Find the version that is installed; a checkout that is not installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("elastic-cnn")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Installed, callbacks/, conf/ and experiments/ are sub-packages of this one; in a checkout they are siblings.
_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))
