"""Make the levels that commands time."""

from torch import Tensor, nn

from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes
from elastic.widths.discovery import discover

FRACTIONS = (0.512, 0.64, 0.8)  # of the channels, of the levels below the network


def make_levels(net: nn.Module, x_BCHW: Tensor) -> Levels:
    """Make four levels of a network, itself the largest."""
    widths = discover(net, x_BCHW)
    return Levels(net, widths, level_sizes(net, widths, x_BCHW, FRACTIONS))
