"""What a layer stores: the tensor behind a name, whether it is parametrized or not."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


class ChannelParametrization(nn.Module):
    """A parametrization whose own tensors follow the channels of the tensor that it parametrizes.

    Surgery re-indexes them with it; any other parametrization fixes the width.

    Attributes:
        dims: the dimensions of the parametrized tensor on which its tensors have an entry a channel.
        fresh: by the name of each of its tensors, what a fresh entry starts with.
    """

    dims: frozenset[int]
    fresh: Mapping[str, float]


def get_original(module: nn.Module, tensor: str) -> Tensor | None:
    """The tensor that holds the values, whether gated or not."""
    if parametrize.is_parametrized(module, tensor):
        chain: Any = module.parametrizations[tensor]  # type: ignore[index]
        return chain.original  # type: ignore[no-any-return]
    return getattr(module, tensor, None)


def get_weight(layer: nn.Module) -> Tensor:
    """The weight that a convolution or linear layer stores, before any gate."""
    weight = get_original(layer, "weight")
    assert weight is not None
    return weight
