"""Lightning callbacks: one behaviour a file. Hooks adapt; functions in `elastic` decide."""

from callbacks.census import Census
from callbacks.grow import GrowOnSaturation
from callbacks.progress import ElasticProgress
from callbacks.prune import PruneByGates

__all__ = ["Census", "ElasticProgress", "GrowOnSaturation", "PruneByGates"]
