"""Networks that tests name in a configuration."""

import os
import signal
from collections.abc import Sequence

from torch import nn

from elastic.models import convnet


def without_norms(
    channels: Sequence[int], pools: Sequence[int], in_channels: int, classes: int
) -> nn.Sequential:
    """What it makes of a batch does not depend on how processes share it."""
    net = convnet(channels, pools, in_channels, classes)
    return nn.Sequential(*(layer for layer in net if not isinstance(layer, nn.BatchNorm2d)))


def lethal_to_the_second(
    channels: Sequence[int], pools: Sequence[int], in_channels: int, classes: int
) -> nn.Sequential:
    """It ends the second process of a run."""
    if os.environ.get("LOCAL_RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return convnet(channels, pools, in_channels, classes)
