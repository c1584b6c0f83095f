"""Odd ways to use a layer: between a first convolution of eight channels and a last one."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tests.elastic.zoo import Net, conv, head

Forward = Callable[[Any, Tensor], Tensor]


def between(forward: Forward, reads: int = 8, **layers: Any) -> nn.Module:
    """Put `forward` between a first convolution and a last one, which reads `reads` channels."""
    return Net(
        lambda m, x: m.head(F.relu(m.last(forward(m, m.stem(x))))),
        **dict(stem=conv(3, 8), last=conv(reads, 5), head=head(5)),
        **layers,
    )
