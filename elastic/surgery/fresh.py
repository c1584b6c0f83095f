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


def pair(patch: Patch, generator: torch.Generator) -> Tensor:
    """Preserve the function where fresh channels stand twice: one copy is read by w, the other by -w.

    Both get a gradient in the first step, and opposite ones, so that they part (arXiv 2306.12700); what is
    read by zeros gets none until its reader has moved.
    """
    return _add_signed(patch, patch.weight, draw_he_normal(patch.weight, generator))


def transfer(patch: Patch, generator: torch.Generator) -> Tensor:
    """Draw what writes a fresh channel with the variance of trained weights (arXiv 2306.12700).

    Weight decay has made these smaller than He's variance, which is that of a network before training: fresh
    weights of that size would learn at another rate. Where the fan-in grows from n to m, trained weights are
    scaled by √(n / m), so that the variance of what they write stays when others come beside them. Norms
    undo the scale; the statistics that they evaluate with need the next epoch to follow.
    """
    weight, std = _rescale(patch)
    noise = torch.randn(weight.shape, generator=generator).to(weight) * std
    return torch.where(patch.rows, noise, weight)


def transfer_pair(patch: Patch, generator: torch.Generator) -> Tensor:
    """Read fresh channels that stand twice by w and -w, with the variance of the trained weights."""
    weight, std = _rescale(patch)
    return _add_signed(patch, weight, torch.randn(weight.shape, generator=generator).to(weight) * std)


def _rescale(patch: Patch) -> tuple[Tensor, Tensor]:
    """Scale a weight to its new fan-in; return it with the deviation of what was trained, scaled like it."""
    copies = _count_copies(patch.in_source)
    scale = float((1 / copies[copies > 0]).sum() / len(copies)) ** 0.5
    weight = patch.weight * scale
    trained = weight[~patch.fresh_out][:, copies == 1]
    std = trained.square().mean().sqrt()
    he = (2 / weight[0].numel()) ** 0.5
    return weight, torch.where(std > 0, std, he)  # of zeros, or of nothing, no deviation can be told


def _count_copies(source: Tensor) -> Tensor:
    """Count how often the channel of each column stands; 0 where it is fresh."""
    return torch.where(source >= 0, torch.bincount(source[source >= 0], minlength=1)[source.clamp(min=0)], 0)


def _add_signed(patch: Patch, weight: Tensor, noise: Tensor) -> Tensor:
    """Add to both columns of a channel that stands twice what is drawn for it, once with either sign."""
    source = patch.in_source
    is_second = source.eq(source[:, None]).tril(-1).any(1)
    sign = torch.where(_count_copies(source) == 2, torch.where(is_second, -1.0, 1.0), 0.0).to(weight)
    shared = noise.index_select(1, source.clamp(min=0))
    return weight + shared * sign.view(1, -1, *[1] * (weight.dim() - 2))


def _average_by(source: Tensor, columns: Tensor) -> Tensor:
    """Replace each column by the mean of all columns of the same source."""
    _, group, count = source.unique(return_inverse=True, return_counts=True)
    sums = columns.new_zeros(len(columns), len(count), *columns.shape[2:]).index_add_(1, group, columns)
    mean = sums / count.view(1, -1, *[1] * (columns.dim() - 2))
    return mean.index_select(1, group)


STRATEGIES: dict[str, Fresh] = {"zero_out": zero_out, "random": random, "split": split}
# Strategies by which half of the fresh channels are grown, and then split into two of opposite sign.
PAIRS: dict[str, tuple[Fresh, Fresh]] = {"pairs": (zero_out, pair), "transfer": (transfer, transfer_pair)}
