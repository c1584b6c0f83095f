"""Classify maps, with all that lies between the last of them and the classes, in one call."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from elastic.dynamic.skipping import compiling
from elastic.dynamic.skipping.active import ActiveLayer, check_maps
from elastic.dynamic.skipping.native import allocate, call, get_workspace, interrupt

MAX_WEIGHTS = 2**20  # for more of them products of matrices are faster


class ActiveHead(ActiveLayer):
    """Average maps, or flatten them, and apply a linear layer, whose weights are copied.

    Args:
        pools: whether each map counts with its mean; else with each pixel.
    """

    def __init__(self, linear: nn.Linear, pools: bool) -> None:
        super().__init__()
        self.pools = pools
        self.weight = linear.weight.detach().clone()
        self.bias = None if linear.bias is None else linear.bias.detach().clone()

    @staticmethod
    def takes(linear: nn.Linear) -> bool:
        """Tell whether a layer is one that this can stand for."""
        return type(linear) is nn.Linear and linear.weight.numel() <= MAX_WEIGHTS

    def forward(self, x_BCHW: Tensor) -> Tensor:
        classes, features = self.weight.shape
        pixels = math.prod(x_BCHW.shape[2:]) if self.pools else 1
        fits = x_BCHW.dim() == 4 and math.prod(x_BCHW.shape[1:]) == features * pixels
        if compiling.load_kernel() is None or not fits:
            interrupt()
            x_BN = (x_BCHW.mean((-2, -1), keepdim=True) if self.pools else x_BCHW).flatten(1)
            return F.linear(x_BN, self.weight, self.bias)
        x_BCHW, batch = check_maps(x_BCHW, x_BCHW.shape[1]), len(x_BCHW)
        y_BK, means = allocate(batch, classes), get_workspace(batch * features)
        call("classify", x_BCHW, batch, features, pixels, self.weight, self.bias, classes, y_BK, means)
        return y_BK
