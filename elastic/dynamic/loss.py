"""Measure what kernel activation modules engage, for the loss and for every number shown.

The MACs of an input are those of its active kernels over active maps, and of the modules that chose them.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from elastic.dynamic.attaching import MODULES
from elastic.dynamic.modules import iterate_modules
from elastic.errors import OptionError
from elastic.measure.counts import count_macs_by_layer
from elastic.ranges import Fraction, NotNegative, checked
from elastic.widths.inputs import Example, list_inputs

Form = Literal["linear", "square", "target", "threshold"]
HAVE_TARGET = ("target", "threshold")
CLOSING = 0.5  # by how much a threshold rises in a step, for each part of the network above the target
By = Literal["kernels", "macs"]


class ActivationCost:
    """Measure what the last batch engaged of a network with kernel activation modules.

    Args:
        net: from `attach_modules`; its structure does not change any more.
        example: an input, or several; their shapes matter.

    Attributes:
        dense_macs: MACs of the network without modules.
        module_macs: MACs of the modules.

    Raises:
        OptionError: the network has no modules.
    """

    def __init__(self, net: fx.GraphModule, example: Example) -> None:
        self.net = net
        if not any(iterate_modules(net)):
            raise OptionError(f"{type(net).__name__} has no kernel activation modules: give it some first")
        by_layer = count_macs_by_layer(net, *list_inputs(example))
        self._layer_macs = {
            path: macs for path, macs in by_layer.items() if not path.startswith(f"{MODULES}.")
        }
        self.dense_macs = sum(self._layer_macs.values())
        self.module_macs = sum(
            next(module.iterate_heads()).linear.weight.numel() for module in iterate_modules(net)
        )

    def macs_B(self) -> Tensor:
        """Count the MACs of each sample; differentiable.

        A layer costs the part of its kernels that is on, times the part of the channels that it reads.
        """
        written: dict[str, Tensor] = {}
        read: dict[str, Tensor] = {}
        for module in iterate_modules(self.net):
            part_B, site = module.active_BK.mean(1), module.site
            for path in (site.writer, *site.followers):
                written[path] = part_B
            for reader in site.readers:
                read[reader.path] = read.get(reader.path, 1) - reader.share * (1 - part_B)
        layers = self._layer_macs.items()
        costs = [macs * written.get(path, 1) * read.get(path, 1) for path, macs in layers]
        fixed = sum(cost for cost in costs if not isinstance(cost, Tensor)) + self.module_macs
        return torch.stack([cost for cost in costs if isinstance(cost, Tensor)]).sum(0) + fixed

    def kernels_B(self) -> Tensor:
        """Measure the part of the kernels that each sample engages; differentiable."""
        return torch.cat([module.active_BK for module in iterate_modules(self.net)], dim=1).mean(1)

    def fraction(self, by: By) -> Tensor:
        """Average the part of the kernels, or of the dense network's MACs; of those it may exceed 1."""
        return self.kernels_B().mean() if by == "kernels" else self.macs_B().mean() / self.dense_macs


@checked
@dataclass(frozen=True)
class ActivationLoss:
    """Charge for what is engaged: gain · fraction, linear or squared, or the squared distance to a target.

    Both published forms are there: the sources (arXiv 1701.05221, IISA 2019) speak of a term proportional to
    the number of kernels engaged, and of its square.

    Args:
        gain: G; 0 leaves the modules to the task's own loss.
        form: "linear" G · fraction, "square" G · fraction², "target" G · (fraction - target)², and a
            multiplier times the same distance, see `update_multiplier`; "threshold" charges nothing: what
            scores have to exceed is steered to the target, see `compute_rise`; None: "target" where there is
            one, else "linear".
        by: of the number of kernels ("kernels") or of the MACs, modules included ("macs").
        target: the fraction to be reached.

    Raises:
        OptionError: a form, a measure or a target that cannot be.
    """

    gain: NotNegative = 1.0
    form: Form | None = None
    by: By = "macs"
    target: Fraction | None = None

    def __post_init__(self) -> None:
        if self.form is None:
            object.__setattr__(self, "form", "linear" if self.target is None else "target")
        if self.form not in get_args(Form) or self.by not in get_args(By):
            raise OptionError(
                f"an activation loss cannot be '{self.form}' by '{self.by}': set form to "
                f"{', '.join(get_args(Form))} and by to {' or '.join(get_args(By))}"
            )
        if (self.form in HAVE_TARGET) != (self.target is not None):
            article = "a" if self.target is None else "no"
            raise OptionError(
                f"an activation loss of the form '{self.form}' has {article} target: "
                f"set form to {' or '.join(HAVE_TARGET)} and a target, or neither"
            )

    def loss(self, fraction: Tensor, ramp_up: float = 1.0, multiplier: Tensor | float = 0.0) -> Tensor:
        """Compute the loss; while `ramp_up` rises from 0 to 1 the gain rises, or the target falls from 1."""
        if self.form == "threshold":
            return torch.zeros_like(fraction)
        if self.target is not None:
            excess = fraction - self._compute_target(ramp_up)
            return self.gain * excess.square() + multiplier * excess
        return ramp_up * self.gain * (fraction if self.form == "linear" else fraction.square())

    def compute_rise(self, fraction: Tensor, ramp_up: float) -> Tensor:
        """Compute by how much the threshold of scores rises after a step; below the target it falls."""
        return CLOSING * (fraction - self._compute_target(ramp_up))

    def update_multiplier(self, multiplier: Tensor, fraction: Tensor, ramp_up: float, part: float) -> Tensor:
        """Compute the multiplier after `part` of an epoch: it rises while the fraction is above the target.

        The square alone comes to rest where the task's pull balances it, above the target. With a
        multiplier that has grown as large as that pull it rests at the target (method of multipliers:
        Nocedal and Wright, Numerical Optimization, 2006, section 17.3).
        """
        if self.form != "target":
            return multiplier
        return multiplier + part * 2 * self.gain * (fraction - self._compute_target(ramp_up))

    def _compute_target(self, ramp_up: float) -> float:
        assert self.target is not None
        return 1 - ramp_up * (1 - self.target)


def compute_ramp(progress: float, begin: float, end: float) -> float:
    """Compute how far a loss has risen when a part of the run has passed: from 0 at `begin` to 1 at `end`.

    Before `begin` there is no such loss; what is told of it then is 1.
    """
    return (progress - begin) / (end - begin) if begin <= progress < end else 1.0
