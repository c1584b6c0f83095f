"""Take the gates off networks for a while, so that a program finds its weights where it made them."""

from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from elastic.measure.counts import list_chains
from elastic.pruning.folding import make_plain
from elastic.pruning.gates import Gate


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
        layers = [
            layer for model in models for layer in model.modules() if parametrize.is_parametrized(layer)
        ]
        self._layers += [_hide(layer) for layer in layers if _has_gates_alone(layer)]

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
        chains: its gates, by the name of the parameter that they mask.
    """

    layer: nn.Module
    gated: type[nn.Module]
    chains: nn.ModuleDict

    def restore(self) -> None:
        """Put the gates back over what the layer has under those names by now, moved and converted alike."""
        for name, chain in self.chains.items():
            weight = cast(nn.Parameter, self.layer._parameters.pop(name))
            chain.to(weight.device, weight.dtype).register_parameter("original", weight)
        self.layer.__class__ = self.gated
        self.layer._modules["parametrizations"] = self.chains


def _has_gates_alone(layer: nn.Module) -> bool:
    return all(isinstance(step, Gate) for chain in list_chains(layer).values() for step in chain.children())


def _hide(layer: nn.Module) -> _HiddenLayer:
    chains = layer._modules["parametrizations"]
    assert isinstance(chains, nn.ModuleDict)
    hidden = _HiddenLayer(layer, type(layer), chains)
    make_plain(layer, {name: cast(nn.Parameter, chain.original) for name, chain in chains.items()})
    return hidden
