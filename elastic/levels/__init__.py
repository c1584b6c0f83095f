"""Nest sub-networks in one storage, and switch between them at run time."""

from elastic.levels.alone import make_alone
from elastic.levels.cascade import fit_threshold, run_cascade
from elastic.levels.cutting import extract_level
from elastic.levels.deadline import Late
from elastic.levels.importance import score_channels
from elastic.levels.nested import Levels
from elastic.levels.refining import RefiningRuntime
from elastic.levels.runtime import Runtime
from elastic.levels.sensitivity import measure_sensitivity
from elastic.levels.sizes import level_sizes

__all__ = [
    "Late",
    "Levels",
    "RefiningRuntime",
    "Runtime",
    "extract_level",
    "fit_threshold",
    "level_sizes",
    "make_alone",
    "measure_sensitivity",
    "run_cascade",
    "score_channels",
]
