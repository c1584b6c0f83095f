"""Keep statistics of norms apart for each set of modules."""

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.dynamic.calls import INSTANCE_NORM
from elastic.dynamic.modules import SetMember
from elastic.widths.tracing import BATCH_NORM


class SetNorm(SetMember):
    """Normalise with statistics of the active set of modules, since sets leave other kernels on.

    Weights and biases are the norm's own. Of the statistics, the active set's are used and kept up to
    date.
    """

    mean_SC: Tensor
    var_SC: Tensor
    seen_S: Tensor  # batches; a name in files

    def __init__(self, norm: BATCH_NORM | INSTANCE_NORM, sets: int) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        self._norm = (norm,)  # not registered: the network has it
        self.training = norm.training
        self.register_buffer("mean_SC", norm.running_mean.repeat(sets, 1))
        self.register_buffer("var_SC", norm.running_var.repeat(sets, 1))
        self.register_buffer("seen_S", torch.zeros(sets))

    # What torch's fusion of convolution and norm reads.
    eps = property(lambda self: self._norm[0].eps)
    weight = property(lambda self: self._norm[0].weight)
    bias = property(lambda self: self._norm[0].bias)
    running_mean = property(lambda self: self.mean_SC[self.active_set])
    running_var = property(lambda self: self.var_SC[self.active_set])

    @property
    def sets(self) -> int:
        return len(self.mean_SC)

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self._norm
        momentum = norm.momentum
        if self.training:
            self.seen_S[self.active_set] += 1
            momentum = 1 / float(self.seen_S[self.active_set]) if momentum is None else momentum
        normalize = F.instance_norm if isinstance(norm, INSTANCE_NORM) else F.batch_norm
        statistics = self.running_mean, self.running_var
        return normalize(x, *statistics, norm.weight, norm.bias, self.training, momentum or 0.0, self.eps)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the norm the active set's statistics."""
        (norm,) = self._norm
        norm.load_state_dict(
            {"running_mean": self.running_mean, "running_var": self.running_var}, strict=False
        )
