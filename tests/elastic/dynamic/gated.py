"""Networks with kernel activation modules that disagree from input to input."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.activations import Activation
from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.modules import iterate_modules
from elastic.errors import StructureError
from elastic.widths.discovery import discover
from tests.elastic.zoo import Case


def gated(net: nn.Module, x: Tensor, seed: int = 0, **options: Any) -> fx.GraphModule:
    """A network in which each module has opinions; not so strong that they enlarge what is rounded."""
    found = attach_modules(net, discover(net, x), **options)
    random = torch.Generator().manual_seed(seed)
    for module in iterate_modules(found):
        for h in module.iterate_heads():
            h.linear.weight.data.normal_(0, h.linear.in_features**-0.5, generator=random)
            h.linear.bias.data.normal_(0, 1, generator=random)
            h.norm.get_buffer("running_mean").normal_(0.3, 0.1, generator=random)
            h.norm.get_buffer("running_var").uniform_(0.5, 1.5, generator=random)
    return found.eval()


def case_or_none(case: Case, seed: int, activation: Activation = "ramp") -> fx.GraphModule | None:
    net, x = case.model(), case.example()
    try:
        return gated(net.eval(), x, seed, activation=activation)
    except StructureError as error:
        assert "cannot be switched off" in str(error) or "no width" in str(error)
        return None
