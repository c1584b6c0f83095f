"""Make any LightningModule elastic: one behaviour a file. Hooks adapt; functions in `elastic` decide."""

from elastic.callbacks.base import ElasticCallback, FollowNetwork
from elastic.callbacks.census import Census
from elastic.callbacks.distil import Distil
from elastic.callbacks.dynamic import PruneDynamically
from elastic.callbacks.ema import AverageWeights
from elastic.callbacks.gates import PruneByGates
from elastic.callbacks.growth import GrowOnSaturation
from elastic.callbacks.joint import TrainJointly
from elastic.callbacks.magnitude import PruneByMagnitude
from elastic.callbacks.panels import LogPanels
from elastic.callbacks.progress import ElasticProgress
from elastic.callbacks.reconstruct import Reconstruct
from elastic.callbacks.resolution import GrowResolution

__all__ = [
    "AverageWeights",
    "Census",
    "Distil",
    "ElasticCallback",
    "ElasticProgress",
    "FollowNetwork",
    "GrowOnSaturation",
    "GrowResolution",
    "LogPanels",
    "PruneByGates",
    "PruneByMagnitude",
    "PruneDynamically",
    "Reconstruct",
    "TrainJointly",
]
