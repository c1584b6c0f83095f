"""Know what is stored for a layer's tensor, and what a stock layer says of itself."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from elastic.widths.operations.interface import ATTRIBUTE
from elastic.widths.parameters import (
    SpectralNorm,
    WeightNorm,
    find_spectral_norm,
    find_weight_norm,
    get_original,
    get_weight_name,
    list_gates,
)
from elastic.widths.tracing.sizes import write_size

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
NEUTRAL = {"bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


@dataclass(frozen=True)
class LayerTensor:
    """Hold a stored tensor that follows its layer's channels.

    `dims` are the dimensions on which it has an entry a channel (a gate of coarse grain lacks some);
    `fill` is what a fresh entry starts with, None for the mean along the axis, or for the first entry where
    they are no fractions; `has_fresh_strategy` says that a strategy of `elastic.surgery.fresh` fills it
    instead; `norm` is what it holds the norms of, if it does; `shape` is how its entries lie beside those of
    the layer's tensor, where it is a row of them; `has_one_scale` says that all entries are divided by one
    number, which long fresh rows would change.
    """

    value: Tensor
    dims: frozenset[int]
    fill: float | None
    has_fresh_strategy: bool = False
    norm: WeightNorm | None = None
    shape: tuple[int, ...] | None = None
    has_one_scale: bool = False


def list_depthwise(model: nn.Module) -> list[str]:
    """List the layers that have a group for each channel."""
    layers = ((path, m) for path, m in model.named_modules() if isinstance(m, _ConvNd))
    return [path for path, layer in layers if 1 < layer.groups == layer.in_channels]


def list_tensors(module: nn.Module, tensor: str) -> list[LayerTensor]:
    """List the tensors behind `module.<tensor>`: itself, or what is stored for it, and its gates' own."""
    value = get_original(module, tensor)
    if value is None:
        return []
    items = [_describe(module, tensor, value)]
    if (norm := find_weight_norm(module, tensor)) is not None:
        dims = frozenset({norm.dim} if norm.norms.dim() else ())  # or it is one number
        items.append(LayerTensor(norm.norms, dims, None, norm=norm))
    if (spectral := find_spectral_norm(module, tensor)) is not None:
        items = [replace(items[0], has_one_scale=True), *_describe_vectors(spectral)]
    for gate in list_gates(module, tensor):
        if max(gate.dims) < value.dim():  # or it is that of a transposed weight, and follows with it
            for name, fill in gate.fresh.items():
                items.append(LayerTensor(getattr(gate, name), gate.get_dims(name), fill))
    return items


def _describe_vectors(norm: SpectralNorm) -> Iterator[LayerTensor]:
    """Describe the singular vectors of spectral norm; fresh zeros leave what it divides by as it is."""
    size = norm.weight.shape
    rows = frozenset({norm.dim})
    for vector, dims in ((norm.left, rows), (norm.right, frozenset(range(len(size))) - rows)):
        shape = tuple(n if dim in dims else 1 for dim, n in enumerate(size))
        yield LayerTensor(vector, dims, 0.0, shape=shape)


def _describe(module: nn.Module, tensor: str, value: Tensor) -> LayerTensor:
    dims = frozenset(range(value.dim()))
    if tensor == "weight" and isinstance(module, NORMS):
        return LayerTensor(value, dims, 1.0)
    if isinstance(module, nn.Embedding):
        return LayerTensor(value, dims, None)  # of gains, shifts or features alike
    if tensor == get_weight_name(module) and value.dim() > 1:
        return LayerTensor(value, dims, 0.0, has_fresh_strategy=True)
    return LayerTensor(value, dims, NEUTRAL.get(tensor))


def resize_attributes(module: nn.Module, tensor: str, dim: int, size: int, depthwise: bool) -> None:
    """Make a layer's attributes say that one of its tensors' dimensions has a new size.

    Args:
        tensor: its name, or what stands in a slot for an attribute, whose number `dim` is meant.
        depthwise: the layer keeps as many groups as channels.
    """
    if tensor.startswith(ATTRIBUTE):
        write_size(module, tensor.removeprefix(ATTRIBUTE), dim, size)
    else:
        resize_layer(module, tensor, dim, size, depthwise)


@singledispatch
def resize_layer(module: nn.Module, tensor: str, dim: int, size: int, depthwise: bool) -> None:
    """Make a layer's attributes say that one of its tensors' dimensions has a new size.

    A layer of one's own that counts channels registers a function of its own.
    """
    library = sys.modules.get("torchvision.ops.deform_conv")  # or the module is none of its
    if library is not None and isinstance(module, library.DeformConv2d):
        _resize_convolution(module, tensor, dim, size, depthwise)


@resize_layer.register(_ConvNd)
def _resize_convolution(module: Any, tensor: str, dim: int, size: int, depthwise: bool) -> None:
    if tensor != "weight":
        return
    if depthwise:  # as many outputs a group as before
        copies = module.out_channels // module.groups
        groups = size if module.transposed else size // copies
        module.groups, module.in_channels, module.out_channels = groups, groups, groups * copies
    elif getattr(module, "transposed", False):
        module.in_channels = size if dim == 0 else module.in_channels
        module.out_channels = size * module.groups if dim == 1 else module.out_channels
    else:
        module.in_channels = size * module.groups if dim == 1 else module.in_channels
        module.out_channels = size if dim == 0 else module.out_channels


@resize_layer.register
def _(module: nn.Linear, tensor: str, dim: int, size: int, depthwise: bool) -> None:
    if tensor == "weight":
        setattr(module, "in_features" if dim == 1 else "out_features", size)


@resize_layer.register
def _(module: nn.Embedding, tensor: str, dim: int, size: int, depthwise: bool) -> None:
    setattr(module, "embedding_dim" if dim == 1 else "num_embeddings", size)


@resize_layer.register
def _(module: nn.GroupNorm, tensor: str, dim: int, size: int, depthwise: bool) -> None:
    if depthwise:  # as many channels a group as before
        module.num_groups = module.num_groups * size // module.num_channels
    module.num_channels = size


@resize_layer.register(nn.LayerNorm)
@resize_layer.register(nn.RMSNorm)
def _(module: nn.LayerNorm, tensor: str, dim: int, size: int, depthwise: bool) -> None:
    before, after = module.normalized_shape[:dim], module.normalized_shape[dim + 1 :]
    module.normalized_shape = (*before, size, *after)


@resize_layer.register
def _(module: nn.PReLU, tensor: str, dim: int, size: int, depthwise: bool) -> None:
    module.num_parameters = size


@resize_layer.register
def _(module: _NormBase, tensor: str, dim: int, size: int, depthwise: bool) -> None:
    module.num_features = size
