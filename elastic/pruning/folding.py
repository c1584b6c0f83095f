"""Fold gates into the weights behind them: a plain model comes out."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from elastic.widths.copying import copy_module
from elastic.widths.parameters import (
    get_original,
    list_chains,
    list_gates,
    list_spectral_norms,
    list_weight_norms,
    own_class,
)


@torch.no_grad()
def compute_mask(layer: nn.Module, tensor: str) -> Tensor:
    """Compute what the gates of a layer's tensor let through: 1 or 0 an entry, 1 where there is no gate."""
    stored = get_original(layer, tensor)
    assert stored is not None
    mask = torch.ones_like(stored)
    for gate in list_gates(layer, tensor):
        mask = gate(mask)
    return mask


def fold_gates(model: nn.Module) -> nn.Module:
    """Make a plain copy of a model, whose weights hold what gates and norms of weights made of them."""
    plain = copy_module(model)
    for module in plain.modules():
        if parametrize.is_parametrized(module):
            _fold(module)
        for name in [hook.name for hook in list_weight_norms(module)]:
            nn.utils.remove_weight_norm(module, name)
        for name in [hook.name for hook in list_spectral_norms(module)]:
            nn.utils.remove_spectral_norm(module, name)
    return plain


def _fold(module: nn.Module) -> None:
    """Make parametrized tensors ordinary parameters."""
    values = {}
    for name, chain in list_chains(module).items():
        chain.eval()  # in training, spectral norm changes what it divides by
        is_trained = all(stored.requires_grad for stored in chain.parameters(recurse=False))
        values[name] = nn.Parameter(getattr(module, name).detach(), is_trained)
    make_plain(module, values)


def make_plain(module: nn.Module, values: Mapping[str, nn.Parameter]) -> None:
    """Give a module parameters in place of tensors that are parametrized; others stay as they are.

    `parametrize.remove_parametrizations` would strip the class, which all copies of the model share.
    """
    others = {name: chain for name, chain in list_chains(module).items() if name not in values}
    if others:
        own_class(module, without=values)
    else:
        module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    if others:
        module.parametrizations = nn.ModuleDict(others)
    # Parameters that were gated come first, as they did when the layer was made.
    unchanged = dict(module._parameters)
    module._parameters.clear()
    for name, value in (*values.items(), *unchanged.items()):
        module.register_parameter(name, value)
