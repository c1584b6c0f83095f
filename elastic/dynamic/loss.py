"""What kernel activation modules engage, and what that costs: for the loss, and for every number shown.

The MACs of an input are those of its active kernels over active maps, and of the modules that chose them.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from elastic.dynamic.attaching import MODULES
from elastic.dynamic.modules import iterate_modules
from elastic.errors import StructureError
from elastic.measure.counts import count_macs_by_layer

Form = Literal["linear", "square", "target"]
By = Literal["count", "macs"]


class ActivationCost:
    """What the last batch engaged of a network with kernel activation modules.

    Args:
        net: from `elastic.dynamic.attach`; its structure does not change any more.
        example: an input; its shape matters.

    Attributes:
        dense: MACs of the network without modules.
        modules: MACs of the modules.
    """

    def __init__(self, net: fx.GraphModule, example: Tensor) -> None:
        self.net = net
        counted = count_macs_by_layer(net, example)
        self.layers = {path: macs for path, macs in counted.items() if not path.startswith(f"{MODULES}.")}
        self.dense = sum(self.layers.values())
        self.modules = sum(module.heads[0].linear.weight.numel() for module in iterate_modules(net))  # type: ignore[misc, union-attr, operator]

    def macs_B(self) -> Tensor:
        """MACs of each sample; differentiable."""
        parts: dict[str, list[Tensor]] = {}
        for module in iterate_modules(self.net):
            share_B = module.active_BK.mean(1)
            for path in (module.site.writer, *module.site.readers, *module.site.depthwise):
                parts.setdefault(path, []).append(share_B)
        rest = sum(macs for path, macs in self.layers.items() if path not in parts) + self.modules
        engaged = [self.layers[path] * torch.stack(shares).prod(0) for path, shares in parts.items()]
        return torch.stack(engaged).sum(0) + rest

    def kernels_B(self) -> Tensor:
        """The part of the kernels that each sample engages; differentiable."""
        return torch.cat([module.active_BK for module in iterate_modules(self.net)], dim=1).mean(1)

    def share(self, by: By) -> Tensor:
        """The mean part of the kernels, or of the MACs of the dense network; the latter may exceed 1."""
        return self.kernels_B().mean() if by == "count" else self.macs_B().mean() / self.dense


@dataclass(frozen=True)
class ActivationLoss:
    """The loss of what is engaged: gain · share, linear or squared, or the squared distance to a target.

    Both published forms are there: the sources (arXiv 1701.05221, IISA 2019) speak of a term proportional to
    the number of kernels engaged, and of its square.

    Args:
        gain: G; 0 leaves the modules to the task's own loss.
        form: "linear" G · share, "square" G · share², "target" G · (share - target)², and a price times the
            same distance, see `reprice`.
        by: of the number of kernels ("count") or of the MACs, modules included ("macs").
        target: the share asked for.

    Raises:
        StructureError: a form, a measure or a target that cannot be.
    """

    gain: float = 1.0
    form: Form = "linear"
    by: By = "macs"
    target: float | None = None

    def __post_init__(self) -> None:
        if self.form not in get_args(Form) or self.by not in get_args(By):
            raise StructureError(
                f"parsimony cannot be '{self.form}' by '{self.by}': set form to {', '.join(get_args(Form))} "
                f"and by to {' or '.join(get_args(By))}"
            )
        if self.gain < 0:
            raise StructureError(
                f"a gain of {self.gain:g} would reward kernels that are on: set it to 0 or more"
            )
        if (self.form == "target") != (self.target is not None):
            raise StructureError("parsimony has a target where its form is 'target', and only there")
        if self.target is not None and not 0 < self.target < 1:
            raise StructureError(
                f"a target of {self.target:g}: set it between 0 and 1, a part of the dense network"
            )

    def loss(self, share: Tensor, ripe: float = 1.0, price: Tensor | float = 0.0) -> Tensor:
        """While `ripe` rises from 0 to 1, so does the gain, or the target falls from 1 to its place."""
        if self.target is not None:
            above = share - self._asked(ripe)
            return self.gain * above.square() + price * above
        return ripe * self.gain * (share if self.form == "linear" else share.square())

    def reprice(self, price: Tensor, share: Tensor, ripe: float, part: float) -> Tensor:
        """The price of a share after `part` of an epoch with this one: it rises while that is above target.

        The square alone comes to rest where the task's pull balances it, above the target. With a price that
        has grown as large as that pull it rests at the target (method of multipliers: Nocedal and Wright,
        Numerical Optimization, 2006, section 17.3).
        """
        return price if self.target is None else price + part * 2 * self.gain * (share - self._asked(ripe))

    def _asked(self, ripe: float) -> float:
        assert self.target is not None
        return 1 - ripe * (1 - self.target)
