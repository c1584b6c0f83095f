"""Switch kernels of a convolution on or off for each input: kernel activation modules.

A module looks at what a convolution reads and says which of its kernels this input needs (LKAM:
Theodorakopoulos et al., Parsimonious Inference on CNNs, arXiv 1701.05221, and Dynamic Pruning of CNN
Networks, IISA 2019). A kernel that is off leaves a map of zeros, which need not be read.
`elastic.dynamic.attaching` gives modules to any CNN, for training and as the reference;
`elastic.dynamic.skipping` executes what they leave.

The source's module is a 1×1 convolution, global average pooling, a sigmoid and a threshold of one half. The
first two are linear, so the maps are averaged first here: the same scores for height · width times less work.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.dynamic.activations import Activation, add_noise, compute_gates, find_active, lean_on_scores
from elastic.dynamic.maps import average_maps, spread_over_maps
from elastic.dynamic.sites import Site
from elastic.errors import OptionError
from elastic.ranges import Count, Natural, explain, fits

WITHIN = 4.0  # standard deviations
# The lowest score at the start, and by how much the highest exceeds it: all are open, or training would
# collapse before the kernels know anything.
START, START_OF_SCALE = (1.0, 3.0), (0.1, 0.8)  # gates of 1; of 0.6 to 1.4


class Head(nn.Module):
    """Score kernels: linear in the means of the maps.

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

    def forward(self, mean_BC: Tensor) -> Tensor:
        norm = self.norm
        if self.training and len(mean_BC) == 1:  # one input has no spread
            mean_BC = F.batch_norm(mean_BC, norm.running_mean, norm.running_var, eps=norm.eps)
        else:
            mean_BC = norm(mean_BC)
        score_BK: Tensor = self.linear(mean_BC.clamp(-WITHIN, WITHIN))
        return score_BK

    def score_steadily(self, mean_BC: Tensor) -> Tensor:
        """Score an input as in evaluation, whatever else is in its batch; in training, statistics follow."""
        mean_BC = mean_BC.detach()
        if self.training and len(mean_BC) > 1:
            self.norm(mean_BC)
        score_BK: Tensor = self.linear(self.look(mean_BC))
        return score_BK

    def look(self, mean_BC: Tensor) -> Tensor:
        """Normalise means as in evaluation, and hold them within bounds."""
        norm = self.norm
        normed_BC = F.batch_norm(mean_BC, norm.running_mean, norm.running_var, eps=norm.eps)
        return normed_BC.clamp(-WITHIN, WITHIN)

    @torch.no_grad()
    def fold(self) -> tuple[Tensor, Tensor, Tensor]:
        """Fold the norm into weight_KC and bias_K, for the means as they are, and give those their bounds."""
        mean_C, var_C = self.norm.running_mean, self.norm.running_var
        assert mean_C is not None and var_C is not None
        spread_C = (var_C + self.norm.eps).sqrt()
        weight_KC = self.linear.weight / spread_C
        within_2C = torch.stack([mean_C - WITHIN * spread_C, mean_C + WITHIN * spread_C])
        return weight_KC, self.linear.bias - weight_KC @ mean_C, within_2C


class SetMember(nn.Module):
    """Hold something for each set of modules, of which the active set's is used.

    Attributes:
        active_set: see `select_set`.
    """

    active_set = 0

    @property
    def sets(self) -> int:
        """Count the sets."""
        raise NotImplementedError


class KernelActivation(SetMember):
    """Gate the kernels of a layer: what it reads → gates of what it writes, 0 for those not to be executed.

    x_BCHW → gate_BK11; or, where channels lie last, x_BHWC → gate_B11K, with any number of positions.

    Args:
        site: the layers that it concerns.
        reads, kernels: C and K.
        sets: how many sets of weights it has, trained with different gains; `active_set` is the one in use.
        activation: what gates are, and so how they learn. "scale": the score and one half, for kernels that
            are on. "ramp": the score between 0 and 1, and 1 for the strongest kernel. The others are 0 or 1
            in evaluation. The strongest kernel is never off then.
            "straight_through": 0 or 1 forward, the sigmoid's gradient backward. "soft": the sigmoid of score
            / `temperature`, to be annealed. "gumbel": 0 or 1 of the score plus logistic noise (Jang et al.,
            arXiv 1611.01144). "hard": 0 or 1, without a gradient of the task: for modules that learn from
            something else.

    Attributes:
        active_BK: 1 for the kernels that it last engaged, else 0, for the loss.
        score_BK: the scores by which it did.
        is_steady: whether an input is scored as in evaluation while it is trained, too; the network then
            learns nothing through what the module looks at.
    """

    kind: ClassVar[str] = "input"  # what it looks at
    deterministic: ClassVar[bool] = True

    def __init__(
        self, site: Site, reads: int, kernels: int, sets: int = 1, activation: Activation = "ramp"
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise OptionError(
                f"kernels cannot be activated by '{activation}': set activation to "
                f"{', '.join(get_args(Activation))}"
            )
        if not fits(sets, Count):
            raise OptionError(explain("sets", sets, Count))
        self.site, self.activation, self.temperature = site, activation, 1.0
        self.start, self.spread = START_OF_SCALE if activation == "scale" else START
        middle = self.start + self.spread / 2
        self.heads = nn.ModuleList(Head(reads, kernels // site.together, middle) for _ in range(sets))
        self.active_BK = self.score_BK = torch.ones(0, kernels)
        self.is_steady = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out, of copies, the history of what was engaged in training, which torch does not copy."""
        active_BK, score_BK = self.active_BK.detach(), self.score_BK.detach()
        return {**self.__dict__, "active_BK": active_BK, "score_BK": score_BK}

    @property
    def sets(self) -> int:
        return len(self.heads)

    def iterate_heads(self) -> Iterator[Head]:
        """Iterate over the heads, one a set."""
        return cast("Iterator[Head]", iter(self.heads))

    def get_head(self) -> Head:
        """Return the active set's head."""
        head = self.heads[self.active_set]
        assert isinstance(head, Head)
        return head

    @torch.no_grad()
    def order_scores(self, worth_K: Tensor) -> None:
        """Let scores start in the order of what kernels are worth, so that they do not close all at once."""
        worth_K = self.average_together(worth_K)
        place_K = worth_K.argsort().argsort() / len(worth_K)
        for head in self.iterate_heads():
            head.linear.bias.copy_(self.start + self.spread * place_K)

    def average_together(self, value: Tensor) -> Tensor:
        """Average what kernels have, along the last dimension, over those that are switched as one."""
        return value.unflatten(-1, (-1, self.site.together)).mean(-1)

    def score_kernels(self, mean_BC: Tensor) -> Tensor:
        """Score what is switched as one, by the active set's head."""
        head = self.get_head()
        score_BK: Tensor = head.score_steadily(mean_BC) if self.is_steady else head(mean_BC)
        return score_BK

    def forward(self, x: Tensor) -> Tensor:
        score_BK = self.score_kernels(average_maps(x, self.site.axis))
        active_BK = find_active(score_BK.detach())
        gate_BK = compute_gates(score_BK, self.activation, self.training, self.temperature)
        if self.training:
            active_BK = lean_on_scores(active_BK, score_BK)
        if (together := self.site.together) > 1:
            score_BK, active_BK, gate_BK = (
                value.repeat_interleave(together, 1) for value in (score_BK, active_BK, gate_BK)
            )
        self.score_BK, self.active_BK = score_BK, active_BK
        return spread_over_maps(gate_BK, x, self.site.axis)


class ConstantActivation(KernelActivation):
    """See nothing, so that the same kernels are engaged for every input: a control."""

    kind = "constant"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for head in self.iterate_heads():
            nn.init.zeros_(head.linear.weight).requires_grad_(False)


class RandomActivation(ConstantActivation):
    """Engage each kernel as often as its sigmoid says, whatever the input is: a control."""

    kind, deterministic = "random", False

    def score_kernels(self, mean_BC: Tensor) -> Tensor:
        return add_noise(super().score_kernels(mean_BC))


KINDS = {module.kind: module for module in (KernelActivation, ConstantActivation, RandomActivation)}


def iterate_modules(net: nn.Module) -> Iterator[KernelActivation]:
    """Iterate over the kernel activation modules of a network."""
    return (module for module in net.modules() if isinstance(module, KernelActivation))


@torch.no_grad()
def lower_scores(net: nn.Module, by: Tensor) -> None:
    """Lower all scores of the active set, as if what they have to exceed had risen."""
    heads = [module.get_head() for module in iterate_modules(net)]
    torch._foreach_add_([head.linear.bias for head in heads], -by)


def describe_modules(net: nn.Module) -> dict[str, Any]:
    """Say what `attach_modules` has to be told to make a network's modules again."""
    modules = list(iterate_modules(net))
    first, widths = modules[0], [module.site.width for module in modules]
    return {
        "names": [name for name in dict.fromkeys(widths) if name is not None],
        **{"sets": first.sets, "activation": first.activation, "kind": first.kind},
        "branches": None in widths,
    }


def select_set(net: nn.Module, k: int) -> None:
    """Use set k of the modules, from the next input on.

    Raises:
        OptionError: there is no such set, or there are no modules.
    """
    members = [module for module in net.modules() if isinstance(module, SetMember)]
    sets = min((member.sets for member in members), default=0)
    if not fits(k, Natural) or k >= sets:
        available = f"0 … {sets - 1}" if sets else "none"
        raise OptionError(f"there is no set {k!r} of kernel activation modules: the network has {available}")
    for member in members:
        member.active_set = k
