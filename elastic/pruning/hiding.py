"""Take the gates off networks for a while, so that a program finds its weights where it made them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from elastic.pruning.folding import make_plain
from elastic.widths.parameters import find_computation, list_chains, list_foreign, list_gates


class HiddenGates:
    """Hold the gates of networks that compute without them until they are shown again.

    Attributes:
        is_hiding: gates are to be hidden now, though loading may have put them back for a moment.
    """

    def __init__(self) -> None:
        self.is_hiding = False
        self._layers: list[_HiddenLayer] = []

    def hide(self, *models: nn.Module) -> None:
        """Take the gates off models, weights and all as they are."""
        self.is_hiding = True
        layers = [layer for model in models for layer in model.modules() if _can_be_hidden(layer)]
        self._layers += map(_hide, layers)

    def show(self) -> None:
        """Put the gates back, for good."""
        self.is_hiding = False
        self.restore()

    def restore(self) -> None:
        """Put the gates back until they are to be hidden again."""
        while self._layers:
            self._layers.pop().restore()


@dataclass(frozen=True)
class _HiddenLayer:
    """Hold the gates of a layer that has its weights under their own names.

    Attributes:
        gated: the layer's class with gates.
        chains: what parametrizes its tensors, by their names.
        normed: the gates of those that a norm or a constraint computes, which is left in the layer.
    """

    layer: nn.Module
    gated: type[nn.Module]
    chains: nn.ModuleDict
    normed: Mapping[str, nn.ModuleList]

    def restore(self) -> None:
        """Put the gates back over what the layer has under those names by now, moved and converted alike."""
        for name, chain in self.chains.items():
            if name in self.normed:
                stored = next(chain.parameters())
                cast(nn.ModuleList, chain).extend(self.normed[name].to(stored.device, stored.dtype))
            else:
                weight = cast(nn.Parameter, self.layer._parameters.pop(name))
                chain.to(weight.device, weight.dtype).register_parameter("original", weight)
        self.layer.__class__ = self.gated
        self.layer._modules["parametrizations"] = self.chains


def _can_be_hidden(layer: nn.Module) -> bool:
    """Tell whether a layer has gates, and beside them no more than a norm or a constraint."""
    names = list_chains(layer)
    has_gates = any(list_gates(layer, name) for name in names)
    return has_gates and not any(list_foreign(layer, name) for name in names)


def _hide(layer: nn.Module) -> _HiddenLayer:
    chains = layer._modules["parametrizations"]
    assert isinstance(chains, nn.ModuleDict)
    normed = {n: _take_gates(chain) for n, chain in chains.items() if find_computation(layer, n)}
    hidden = _HiddenLayer(layer, type(layer), chains, normed)
    values = {name: chain.original for name, chain in chains.items() if name not in normed}
    make_plain(layer, {name: cast(nn.Parameter, value) for name, value in values.items()})
    return hidden


def _take_gates(chain: nn.Module) -> nn.ModuleList:
    """Take all gates from what parametrizes a tensor, behind what normalises it."""
    steps = cast(nn.ModuleList, chain)
    gates = nn.ModuleList(list(steps)[1:])
    del steps[1:]
    return gates
