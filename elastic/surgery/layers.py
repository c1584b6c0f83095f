"""What is really stored for a layer's tensor, and what a stock layer says of itself."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)
NEUTRAL = {"bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


@dataclass(frozen=True)
class LayerTensor:
    """A stored tensor that follows its layer's channels.

    `dims` are the dimensions on which it has an entry a channel (a gate of coarse grain lacks some);
    `fill` is what a fresh entry starts with, None for the mean along the axis; `has_fresh_strategy` says that
    a strategy of `elastic.surgery.fresh` fills it instead.
    """

    value: Tensor
    dims: frozenset[int]
    fill: float | None
    has_fresh_strategy: bool = False


def list_tensors(module: nn.Module, tensor: str) -> list[LayerTensor]:
    """The tensors behind `module.<tensor>`: itself, or a gated tensor's original and its gates' own."""
    if not parametrize.is_parametrized(module, tensor):
        value = getattr(module, tensor, None)
        return [] if value is None else [_plain(module, tensor, value)]
    chain: Any = module.parametrizations[tensor]  # type: ignore[index]
    found = [_plain(module, tensor, chain.original)]
    for gate in chain:
        found += [LayerTensor(getattr(gate, name), gate.dims, fill) for name, fill in gate.fresh.items()]
    return found


def _plain(module: nn.Module, tensor: str, value: Tensor) -> LayerTensor:
    dims = frozenset(range(value.dim()))
    if tensor == "weight" and value.dim() > 1 and not isinstance(module, NORMS):
        return LayerTensor(value, dims, 0.0, has_fresh_strategy=True)
    if tensor == "weight" and isinstance(module, NORMS):
        return LayerTensor(value, dims, 1.0)
    return LayerTensor(value, dims, NEUTRAL.get(tensor))


def resize_attributes(module: nn.Module, tensor: str, dim: int, size: int, each: bool) -> None:
    """Make a stock layer's attributes say that one of its tensors' dimensions has a new size.

    Args:
        each: the layer keeps as many groups as channels.
    """
    if isinstance(module, nn.modules.conv._ConvNd) and tensor == "weight":
        if dim == 1:
            module.in_channels = size * module.groups
        else:
            if each:
                module.groups = module.in_channels = size * module.groups // module.out_channels
            module.out_channels = size
    elif isinstance(module, nn.Linear) and tensor == "weight":
        setattr(module, "in_features" if dim == 1 else "out_features", size)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = size
        module.num_groups = size if each else module.num_groups
    elif isinstance(module, nn.LayerNorm):
        shape = list(module.normalized_shape)
        shape[dim] = size
        module.normalized_shape = tuple(shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = size
    elif isinstance(module, NORMS):
        module.num_features = size  # type: ignore[assignment]
