"""Leave out, in execution, what kernel activation modules have switched off.

The traced network is rewritten for inference on the CPU: norms are folded into convolutions, convolutions
take the addition and the ReLU behind them, and each of them, each module and each pooling is told which
channels of what it reads are active; the head is one layer. What the kernel does is played as one call, for a
few samples at a time. How a convolution is carried out (by the kernel, by stock torch on gathered weights, or
dense and masked) is measured on this machine, layer by layer; and then whether that is faster than the kernel
alone, or than stock torch, which skips nothing and only masks.
"""

from elastic.dynamic.skipping.convolution import list_methods
from elastic.dynamic.skipping.network import make_masked, make_skipping, tune
from elastic.dynamic.skipping.rewrite import rewrite

__all__ = ["list_methods", "make_masked", "make_skipping", "rewrite", "tune"]
