"""Read what a layer stores: the tensor behind a name, whether it is parametrized or not."""

from collections.abc import Iterator, Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize


class ChannelParametrization(nn.Module):
    """Carry tensors of one's own that follow the channels of the tensor that is parametrized.

    Surgery re-indexes them with it; any other parametrization fixes the width.

    Attributes:
        dims: the dimensions of the parametrized tensor on which its tensors have an entry a channel.
        fresh: by the name of each of its tensors, what a fresh entry starts with.
    """

    dims: frozenset[int]
    fresh: Mapping[str, float]

    def get_dims(self, name: str) -> frozenset[int]:
        """Get the dimensions on which one of its tensors has an entry a channel, where it lacks some."""
        return self.dims


def get_kind(module: nn.Module) -> type[nn.Module]:
    """Get a module's class, as it was before anything parametrized its tensors."""
    is_parametrized = "parametrizations" in module._modules
    return parametrize.type_before_parametrizations(module) if is_parametrized else type(module)


def get_parametrizations(module: nn.Module, tensor: str) -> parametrize.ParametrizationList | None:
    """Get the chain of parametrizations of a tensor, if it has any."""
    if "parametrizations" not in module._modules or not parametrize.is_parametrized(module, tensor):
        return None  # of most, found at once
    return cast(parametrize.ParametrizationList, cast(nn.ModuleDict, module.parametrizations)[tensor])


def list_parametrizations(module: nn.Module, tensor: str) -> Iterator[nn.Module]:
    """List the parametrizations of a tensor, in order."""
    yield from get_parametrizations(module, tensor) or ()


def get_original(module: nn.Module, tensor: str) -> Tensor | None:
    """Get the tensor that holds the values, whether gated or not; what is computed of several is computed."""
    if tensor in module._parameters:
        return module._parameters[tensor]
    parametrizations = get_parametrizations(module, tensor)
    if parametrizations is None or not hasattr(parametrizations, "original"):
        return cast(Tensor | None, getattr(module, tensor, None))
    return parametrizations.original


def get_weight(layer: nn.Module) -> Tensor:
    """Get the weight that a convolution or linear layer stores, before any gate."""
    weight = get_original(layer, "weight")
    assert weight is not None
    return weight
