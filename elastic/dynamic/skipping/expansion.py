"""Expand maps to many channels and project them back, by the channels that are active alone."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.dynamic.skipping.active import Active, ActiveLayer, copy_bias


class ActiveExpansion(ActiveLayer):
    """Apply two linear layers to each position of maps whose channels lie last, by stock torch.

    Between them are the gates of the first one's kernels, and functions behind which maps that are off are
    zeros. Weights of active channels are gathered for each sample: as a product of matrices has many
    positions, that pays.

    Args:
        first, last: their weights are copied.
        between: the functions, which work on each entry by itself: gated maps, gates → maps.
    """

    is_compiled = False

    def __init__(
        self, first: nn.Linear, between: Callable[[Tensor, Tensor], Tensor], last: nn.Linear
    ) -> None:
        super().__init__()
        self.between = between
        self.weight_KC, self.bias_K = first.weight.detach().clone(), copy_bias(first, first.out_features)
        self.weight_KN = last.weight.detach().T.clone(memory_format=torch.contiguous_format)
        self.bias_N = copy_bias(last, last.out_features)

    def forward(self, x: Tensor, reads: None, writes: Active) -> Tensor:
        x_BPC = x.flatten(1, -2)
        y_BPN = x.new_empty(*x_BPC.shape[:2], len(self.bias_N))
        for x_PC, y_PN, channel_K, count, gate_K in zip(x_BPC, y_BPN, *writes, strict=True):
            active = channel_K[:count]
            weight_AC, bias_A = self.weight_KC.index_select(0, active), self.bias_K.index_select(0, active)
            gate_A = gate_K[active]
            hidden_PA = self.between(F.linear(x_PC, weight_AC, bias_A) * gate_A, gate_A)
            torch.addmm(self.bias_N, hidden_PA, self.weight_KN.index_select(0, active), out=y_PN)
        return y_BPN.view(*x.shape[:-1], -1)
