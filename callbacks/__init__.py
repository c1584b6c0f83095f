"""Lightning callbacks: one behaviour a file. Hooks adapt; functions in `elastic` decide."""

from callbacks.average import AverageWeights
from callbacks.census import Census
from callbacks.distil import Distil
from callbacks.grow import GrowOnSaturation
from callbacks.joint import TrainJointly
from callbacks.magnitude import PruneByMagnitude
from callbacks.panels import LogPanels
from callbacks.progress import ElasticProgress
from callbacks.prune import PruneByGates
from callbacks.reconstruct import Reconstruct
from callbacks.switch import SwitchKernels

__all__ = [
    "AverageWeights",
    "Census",
    "Distil",
    "ElasticProgress",
    "GrowOnSaturation",
    "LogPanels",
    "PruneByGates",
    "PruneByMagnitude",
    "Reconstruct",
    "SwitchKernels",
    "TrainJointly",
]
