"""Turn scores of kernels into gates, and say how gates learn.

How gates learn decides what they are worth. The sigmoid's gradient of a hard gate says what a little more of
a map would do, not what its absence does, and modules that have learnt from it choose worse than ones that
see nothing. A ramp fades a map out before it is left out, so that its gradient is true wherever a kernel is
on. But what reads a faded map can make up for it, so that no kernel resists until all are next to zero, where
noise decides which of them are off. A scale has no upper end and stops at one half: kernels that are spared
equally keep their order and their distances (the gates of feature boosting and suppression: Gao et al., arXiv
1810.05331, with a threshold in the place of the k highest).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Activation = Literal["scale", "ramp", "straight_through", "soft", "gumbel", "hard"]
MIN_SCALE = 0.5  # of a scale's gates that are on
MIN_PROBABILITY = 1e-6  # that noise is drawn for


def find_active(score_BK: Tensor) -> Tensor:
    """Give 1 where a kernel is on, as its score is positive or the highest of all; else 0."""
    best_B1 = score_BK.argmax(1, keepdim=True)
    return (score_BK > 0).to(score_BK.dtype).scatter(1, best_B1, 1.0)


def ramp(score_BK: Tensor) -> Tensor:
    """Clamp scores between 0 and 1, so that a kernel fades before it is off; 1 for the highest.

    Scores begin at 1, where the gradient is that of a score below it; that of `clamp` is 0 from torch 2.14.
    """
    best_B1 = score_BK.argmax(1, keepdim=True)
    within_BK = score_BK.masked_fill(score_BK > 1, 1.0).masked_fill(score_BK < 0, 0.0)
    return within_BK.scatter(1, best_B1, 1.0)


def scale(score_BK: Tensor) -> Tensor:
    """Add one half to the scores of kernels that are on; the highest has one half if it is not positive."""
    return find_active(score_BK.detach()) * (score_BK.masked_fill(score_BK < 0, 0.0) + MIN_SCALE)


def soften(score_BK: Tensor, temperature: float) -> Tensor:
    """Take the sigmoid of the scores, which is next to 0 or 1 where the temperature is low."""
    return torch.sigmoid(score_BK / temperature)


def pass_straight(score_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """Give 0 or 1 forward, and the sigmoid's gradient backward."""
    soft_BK = torch.sigmoid(score_BK)
    return find_active(score_BK.detach()) + soft_BK - soft_BK.detach()


def cut(score_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """Give 0 or 1, and the task no say in it."""
    return find_active(score_BK.detach())


def draw_gates(score_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """Give 0 or 1 as often as the sigmoid says: Jang et al., arXiv 1611.01144."""
    return pass_straight(add_noise(score_BK))


def add_noise(score_BK: Tensor) -> Tensor:
    """Add logistic noise, so that a score is positive as often as its sigmoid says."""
    return score_BK + torch.logit(torch.rand_like(score_BK).clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY))


# Gates that are more than 0 or 1, in evaluation, too …
GRADED: dict[str, Callable[[Tensor], Tensor]] = {"ramp": ramp, "scale": scale}
# … and those that are so in training only.
TRAINED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "soft": soften,
    "gumbel": draw_gates,
    "straight_through": pass_straight,
    "hard": cut,
}


def compute_gates(score_BK: Tensor, activation: Activation, training: bool, temperature: float) -> Tensor:
    """Turn scores into what maps are multiplied by, 0 for kernels that are not to be executed."""
    if activation in GRADED:
        return GRADED[activation](score_BK)
    return TRAINED[activation](score_BK, temperature) if training else find_active(score_BK.detach())


def lean_on_scores(active_BK: Tensor, score_BK: Tensor) -> Tensor:
    """Give what is active a gradient for the scores: the sigmoid's, of each kernel the mean over the batch.

    Each sample's own would be largest where scores are next to zero. To engage less would then drive the
    scores of a batch apart, in whatever direction the weights have by chance.
    """
    soft_BK = torch.sigmoid(score_BK.detach())
    slope_1K = (soft_BK * (1 - soft_BK)).mean(0, keepdim=True)
    return active_BK + slope_1K * (score_BK - score_BK.detach())
