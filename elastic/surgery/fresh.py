"""Start the weights of fresh channels.

A strategy gets a weight already re-indexed, with zeros where a channel is new, and fills it in. Whatever
is merely carried a channel (norms, biases) starts neutral, see `elastic.surgery.layers`.
`elastic.growth.gradmax` builds on `zero_out` and sets the incoming weights from a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Patch:
    """Hold the weight (out, in, …) of a layer with its fresh rows and columns.

    `fresh_out` and `fresh_in` are boolean, one entry a position of dims 0 and 1; `in_source` is the old
    position that each new column continues, so that columns split from one channel can be told.
    """

    layer: str
    weight: Tensor
    fresh_out: Tensor
    fresh_in: Tensor
    in_source: Tensor

    @property
    def rows(self) -> Tensor:
        """Shape `fresh_out` to be broadcast over the weight."""
        return self.fresh_out.view(-1, *[1] * (self.weight.dim() - 1))

    @property
    def columns(self) -> Tensor:
        """Shape `fresh_in` to be broadcast over the weight."""
        return self.fresh_in.view(1, -1, *[1] * (self.weight.dim() - 2))


Fresh = Callable[[Patch, torch.Generator], Tensor]


def draw_he_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from a normal of variance 2 / fan-in (He et al., arXiv 1502.01852), always on the CPU."""
    std = (2 / like[0].numel()) ** 0.5
    return (torch.randn(like.shape, generator=generator) * std).to(like)


def zero_out(patch: Patch, generator: torch.Generator) -> Tensor:
    """Preserve the function: what writes a fresh channel is random, what reads it starts at zero."""
    if not patch.fresh_out.any():
        return patch.weight
    return torch.where(patch.rows, draw_he_normal(patch.weight, generator), patch.weight)


def random(patch: Patch, generator: torch.Generator) -> Tensor:
    """Draw both what writes and what reads a fresh channel: the function changes at once."""
    return torch.where(patch.rows | patch.columns, draw_he_normal(patch.weight, generator), patch.weight)


def split(patch: Patch, generator: torch.Generator, noise: float = 0.1) -> Tensor:
    """Preserve the function where channels are repeated (Net2Net, arXiv 1511.05641, section 2.2).

    The copies' readers share the weight; noise that sums to zero over the copies, `noise` times the
    weight's root mean square, lets them part without changing the function.
    """
    weight, source = zero_out(patch, generator), patch.in_source
    copies = torch.bincount(source[source >= 0], minlength=1)[source.clamp(min=0)]
    copied = ((copies > 1) & (source >= 0)).nonzero().flatten()
    if not len(copied):
        return weight
    columns = weight.index_select(1, copied)
    std = columns.square().mean().sqrt() * noise
    draw = torch.randn(columns.shape, generator=generator).to(columns) * std
    return weight.index_add(1, copied, draw - _average_by(source[copied], draw))


def _average_by(source: Tensor, columns: Tensor) -> Tensor:
    """Replace each column by the mean of all columns of the same source."""
    _, group, count = source.unique(return_inverse=True, return_counts=True)
    sums = columns.new_zeros(len(columns), len(count), *columns.shape[2:]).index_add_(1, group, columns)
    mean = sums / count.view(1, -1, *[1] * (columns.dim() - 2))
    return mean.index_select(1, group)


STRATEGIES: dict[str, Fresh] = {"zero_out": zero_out, "random": random, "split": split}
