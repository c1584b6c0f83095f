"""Kernel activation modules: kernels of a convolution that are switched on or off for each input.

A module looks at what a convolution reads and says which of its kernels this input needs (LKAM:
Theodorakopoulos et al., Parsimonious Inference on CNNs, arXiv 1701.05221, and Dynamic Pruning of CNN
Networks, IISA 2019). A kernel that is off leaves a map of zeros, which need not be read. `elastic.dynamic`
attaches modules to any CNN, for training and as the reference; `elastic.skipping` executes what they leave.

The source's module is a 1×1 convolution, global average pooling, a sigmoid and a threshold of one half. The
first two are linear, so the maps are averaged first here: the same scores for height · width times less work.

How gates learn decides what they are worth. The sigmoid's gradient of a hard gate says what a little more of
a map would do, not what its absence does, and modules that have learnt from it choose worse than ones that
see nothing. A ramp fades a map out before it is left out, so that its gradient is true wherever a kernel is
on. But what reads a faded map can make up for it, so that no kernel resists until all are next to zero, where
noise decides which of them are off. A scale has no upper end and stops at one half: kernels that are spared
alike keep their order and their distances (the gates of feature boosting and suppression: Gao et al., arXiv
1810.05331, with a threshold in the place of the k highest).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.widths.tracing import BATCH_NORM

Choice = Literal["scale", "ramp", "straight_through", "soft", "gumbel"]
LEAST = 0.5  # of a scale's gates that are on
WITHIN = 4.0  # standard deviations
# The lowest score at the start, and by how much the highest exceeds it: all are open, or training would
# collapse before the kernels know anything.
START, START_OF_SCALE = (1.0, 3.0), (0.1, 0.8)  # gates of 1; of 0.6 to 1.4


def find_active(score_BK: Tensor) -> Tensor:
    """1 where a kernel is on: its score is positive, or it is the highest of all; else 0."""
    best_B1 = score_BK.argmax(1, keepdim=True)
    return (score_BK > 0).to(score_BK.dtype).scatter(1, best_B1, 1.0)


def ramp(score_BK: Tensor) -> Tensor:
    """The score between 0 and 1, so that a kernel fades before it is off; 1 for the highest."""
    best_B1 = score_BK.argmax(1, keepdim=True)
    return score_BK.clamp(0, 1).scatter(1, best_B1, 1.0)


def scale(score_BK: Tensor) -> Tensor:
    """One half more than the score where a kernel is on, one half for the highest if it is not positive."""
    return find_active(score_BK.detach()) * (score_BK.clamp(min=0) + LEAST)


# Gates that are more than 0 or 1, in evaluation too.
GRADED = {"ramp": ramp, "scale": scale}


@dataclass(frozen=True)
class Site:
    """The layers that a width's kernels are in: who computes them, who reads their maps, who follows each."""

    writer: str
    readers: tuple[str, ...]
    depthwise: tuple[str, ...]  # convolutions convolutions


class Head(nn.Module):
    """Scores of kernels: linear in the means of the maps.

    The means are normalised over the batch, without parameters, or the scores would differ little from input
    to input and a module learn to engage the same kernels for all. In evaluation that is linear, too. Far
    from the mean they all count as equally far: a map that is off but for one image in thousands has next to
    no variance, and would decide alone when it is on. Weights start at zero: what is looked at is learnt, not
    drawn.
    """

    def __init__(self, reads: int, kernels: int, start: float) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(reads, affine=False), nn.Linear(reads, kernels)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, start)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        mean_BC, norm = x_BCHW.mean((2, 3)), self.norm
        if self.training and len(mean_BC) == 1:  # one input has no spread
            mean_BC = F.batch_norm(mean_BC, norm.running_mean, norm.running_var, eps=norm.eps)
        else:
            mean_BC = norm(mean_BC)
        score_BK: Tensor = self.linear(mean_BC.clamp(-WITHIN, WITHIN))
        return score_BK

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """weight_KC and bias_K of the same scores, from the means as they are, and the bounds of those."""
        middle_C, var_C = self.norm.running_mean, self.norm.running_var
        assert middle_C is not None and var_C is not None
        spread_C = (var_C + self.norm.eps).sqrt()
        weight_KC = self.linear.weight / spread_C
        within_2C = torch.stack([middle_C - WITHIN * spread_C, middle_C + WITHIN * spread_C])
        return weight_KC, self.linear.bias - weight_KC @ middle_C, within_2C


class KernelActivation(nn.Module):
    """x_BCHW, what the convolution reads → gate_BK11 of its kernels, 0 for those not to be executed.

    Args:
        site: the layers that it concerns.
        reads, kernels: C and K.
        sets: how many sets of weights it has, trained with different gains; `chosen` says which one rules.
        choice: what gates are, and so how they learn. "scale": the score and one half, for kernels that are
            on. "ramp": the score between 0 and 1, and 1 for the strongest kernel. The others are 0 or 1 in
            evaluation. The strongest kernel is never off then.
            "straight_through": 0 or 1 forward, the sigmoid's gradient backward. "soft": the sigmoid of score
            / `temperature`, to be annealed. "gumbel": 0 or 1 of the score plus logistic noise (Jang et al.,
            arXiv 1611.01144).

    Attributes:
        active_BK: 1 for the kernels that it last engaged, else 0, for the loss.
    """

    kind = "input"  # what it looks at

    def __init__(self, site: Site, reads: int, kernels: int, sets: int = 1, choice: Choice = "ramp") -> None:
        super().__init__()
        if choice not in get_args(Choice):
            raise StructureError(
                f"kernels cannot be chosen by '{choice}': use one of {', '.join(get_args(Choice))}"
            )
        if sets < 1:
            raise StructureError(f"{sets} sets of modules: there must be 1 or more")
        self.site, self.choice, self.temperature, self.active_set = site, choice, 1.0, 0
        self.start, self.spread = START_OF_SCALE if choice == "scale" else START
        middle = self.start + self.spread / 2
        self.heads = nn.ModuleList(Head(reads, kernels, middle) for _ in range(sets))
        self.active_BK = torch.ones(0, kernels)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what was engaged in training has a history, which torch does not copy."""
        return {**self.__dict__, "active_BK": self.active_BK.detach()}

    @torch.no_grad()
    def order_scores(self, worth_K: Tensor) -> None:
        """Let scores start in the order of what kernels are worth, so that they do not close all at once."""
        place_K = worth_K.argsort().argsort() / len(worth_K)
        for head in self.heads:
            head.linear.bias.copy_(self.start + self.spread * place_K)  # type: ignore[union-attr, operator]

    def scores(self, x_BCHW: Tensor) -> Tensor:
        score_BK: Tensor = self.heads[self.active_set](x_BCHW)
        return score_BK

    def forward(self, x_BCHW: Tensor) -> Tensor:
        score_BK = self.scores(x_BCHW)
        self.active_BK = find_active(score_BK.detach())
        gate_BK = self._gate(score_BK)
        if self.training:
            self.active_BK = _leaning(self.active_BK, score_BK)
        return gate_BK[:, :, None, None]

    def _gate(self, score_BK: Tensor) -> Tensor:
        if self.choice in GRADED:
            return GRADED[self.choice](score_BK)
        if not self.training:
            return self.active_BK
        if self.choice == "soft":
            return torch.sigmoid(score_BK / self.temperature)
        if self.choice == "gumbel":
            score_BK = _noisy(score_BK)
        soft_BK = torch.sigmoid(score_BK)
        return find_active(score_BK.detach()) + soft_BK - soft_BK.detach()


class ConstantActivation(KernelActivation):
    """A control: it sees nothing, so that it engages the same kernels for every input."""

    kind = "constant"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for head in self.heads:
            assert isinstance(head, Head)
            nn.init.zeros_(head.linear.weight).requires_grad_(False)


class RandomActivation(ConstantActivation):
    """A control: each kernel is on as often as its sigmoid says, whatever the input is."""

    kind = "random"

    def scores(self, x_BCHW: Tensor) -> Tensor:
        return _noisy(super().scores(x_BCHW))


class SetNorm(nn.Module):
    """A batch norm with statistics for each set of modules, since sets leave other kernels on.

    Weights and biases are the norm's own. Of the statistics, the chosen set's are used and kept up to date.
    """

    mean_SC: Tensor
    var_SC: Tensor
    seen_S: Tensor

    def __init__(self, norm: BATCH_NORM, sets: int) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        self._norm = (norm,)  # not registered: the network has it
        self.training, self.active_set = norm.training, 0
        self.register_buffer("mean_SC", norm.running_mean.repeat(sets, 1))
        self.register_buffer("var_SC", norm.running_var.repeat(sets, 1))
        self.register_buffer("seen_S", torch.zeros(sets))  # batches

    eps = property(lambda self: self._norm[0].eps)
    weight = property(lambda self: self._norm[0].weight)
    bias = property(lambda self: self._norm[0].bias)
    running_mean = property(lambda self: self.mean_SC[self.active_set])
    running_var = property(lambda self: self.var_SC[self.active_set])

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self._norm
        momentum = norm.momentum
        if self.training:
            self.seen_S[self.active_set] += 1
            momentum = 1 / float(self.seen_S[self.active_set]) if momentum is None else momentum
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, norm.weight, norm.bias, self.training, momentum or 0.0, self.eps)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the norm the chosen set's statistics."""
        (norm,) = self._norm
        norm.load_state_dict(
            {"running_mean": self.running_mean, "running_var": self.running_var}, strict=False
        )


def _leaning(active_BK: Tensor, score_BK: Tensor) -> Tensor:
    """The same, with a gradient for the scores: the sigmoid's, of each kernel the mean over the batch.

    Each sample's own would be largest where scores are next to zero. To engage less would then drive the
    scores of a batch apart, in whatever direction the weights have by chance.
    """
    soft_BK = torch.sigmoid(score_BK.detach())
    slope_1K = (soft_BK * (1 - soft_BK)).mean(0, keepdim=True)
    return active_BK + slope_1K * (score_BK - score_BK.detach())


def _noisy(score_BK: Tensor) -> Tensor:
    """Positive as often as the sigmoid of the score says: logistic noise is added."""
    return score_BK + torch.logit(torch.rand_like(score_BK).clamp(1e-6, 1 - 1e-6))


KINDS = {made.kind: made for made in (KernelActivation, ConstantActivation, RandomActivation)}


def iterate_modules(net: nn.Module) -> Iterator[KernelActivation]:
    """The kernel activation modules of a network."""
    return (module for module in net.modules() if isinstance(module, KernelActivation))


def select_set(net: nn.Module, chosen: int) -> None:
    """Let one of the sets of modules rule, from the next input on.

    Raises:
        StructureError: there is no such set, or there are no modules.
    """
    found = list(iterate_modules(net))
    sets = min((len(module.heads) for module in found), default=0)
    if not 0 <= chosen < sets:
        has = f"0 … {sets - 1}" if sets else "none"
        raise StructureError(f"there is no set {chosen} of kernel activation modules: the network has {has}")
    for module in net.modules():
        if isinstance(module, KernelActivation | SetNorm):
            module.active_set = chosen
