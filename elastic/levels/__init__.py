"""Nested sub-networks in one storage, switched at run time."""

from elastic.levels.importance import score_channels
from elastic.levels.nested import Levels, extract_level
from elastic.levels.runtime import Runtime
from elastic.levels.sizes import level_sizes

__all__ = ["Levels", "Runtime", "extract_level", "level_sizes", "score_channels"]
