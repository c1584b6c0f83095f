"""Know what stock layers and functions give on the meta device, without calling them: many are slow there.

Whatever is not known for certain is called, so that torch itself refuses what does not fit.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = Sequence[int]

# Functions that work entry by entry; norms; those that join two tensors, or one and a number.
UNARY = {F.relu, F.gelu, F.silu, F.hardswish, F.dropout, torch.relu}
UNARY |= {torch.sigmoid, F.leaky_relu, F.relu6, F.hardsigmoid, F.hardtanh}
UNARY_MODULES = {"torchvision.ops.stochastic_depth"}  # that need not be there
NORMS = {F.batch_norm, F.group_norm}
BINARY = {operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, torch.add, torch.mul}
IN_PLACE = {operator.iadd, operator.imul}
SPELLED = {"add", "add_", "mul", "mul_", "relu", "relu_", "sigmoid", "sub"}  # methods
ANSWERS = {torch.allclose, torch.equal, torch.is_nonzero}  # about data
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions


def infer_layer(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """Find what a layer gives; None where it has to be called."""
    rule = LAYERS.get(type(layer))
    if rule is None or kwargs or len(args) != 1 or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    (x,) = args
    shape = rule(layer, x) if _is_known(x) else None
    return None if shape is None else x.new_empty(shape)


def infer_call(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """Find what a function or a method gives; None where it has to be called."""
    if target is torch.cat:
        return _infer_concatenation(args, kwargs)
    if target == "numpy" and _is_known(args[0]):
        return args[0].detach()  # which the forward can only keep
    if target == "item" and _is_known(args[0]):
        return args[0].reshape(())  # a number that the data decide
    if target in ANSWERS and any(_is_known(x) for x in args):
        return torch.empty((), dtype=torch.bool, device="meta")
    if not args or not _is_known(args[0]):
        return None
    first, *others = args
    if target is F.layer_norm:
        return first.new_empty(first.shape)
    if target in NORMS:
        return infer_norm(first)
    is_known = target in SPELLED if isinstance(target, str) else _keeps_shape(target)
    if is_known and not any(isinstance(other, Tensor) for other in others[:1]):
        return infer_each(first)
    if len(others) == 1 and not kwargs and (is_known or target in BINARY):
        return _infer_joined(target, first, others[0])
    if target is F.adaptive_avg_pool2d and len(others) == 1 and first.is_contiguous():
        return first.new_empty(_pool(first.shape, others[0], 2))
    return None


def infer_each(x: Tensor) -> Tensor | None:
    """Find what an operation that works entry by entry gives; None where it has to be called.

    Of a part of a tensor, say, it gives one without gaps, but for what is done in place.
    """
    return x.detach() if _is_dense(x) else None


def infer_norm(x: Tensor) -> Tensor:
    """Find what batch and group norm give: without gaps, in the usual order or with channels last.

    They are not called where there are gaps: on the meta device they leave them another order.
    """
    dense = torch.empty_like(x)  # in the order that the dimensions have in memory
    return dense if _is_dense(dense) else x.new_empty(x.shape)


def _is_dense(x: Tensor) -> bool:
    """Tell whether a tensor has no gaps, and one of the two orders that torch keeps."""
    if x.is_contiguous():
        return True
    return x.dim() in CHANNELS_LAST and x.is_contiguous(memory_format=CHANNELS_LAST[x.dim()])


def _is_known(x: Any) -> bool:
    """Tell whether a value is a tensor of which the shape is all there is to know."""
    return isinstance(x, Tensor) and x.is_meta and x.is_floating_point()


def _keeps_shape(function: Any) -> bool:
    return function in UNARY or getattr(function, "__module__", None) in UNARY_MODULES


def _infer_joined(target: Any, first: Tensor, second: Any) -> Tensor | None:
    """Find what two tensors of one type give, or a tensor and a number."""
    if isinstance(second, int | float):
        return infer_each(first)
    if not _is_known(second) or second.dtype != first.dtype:
        return None
    if second.shape == first.shape:
        return infer_each(first) if second.stride() == first.stride() else None
    if isinstance(target, str) or not (first.is_contiguous() and second.is_contiguous()):
        return None  # in place, say
    shape = torch.broadcast_shapes(first.shape, second.shape)
    return None if target in IN_PLACE and shape != first.shape else first.new_empty(shape)


def _infer_concatenation(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """Find what tensors of one type, laid out alike, give side by side."""
    if not args or not isinstance(args[0], list | tuple) or not all(map(_is_known, args[0])):
        return None
    parts, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = parts[0]
    shape = list(first.shape)
    shape[dim] = 0
    for part in parts:
        sizes = list(part.shape)
        if len(sizes) != len(shape) or part.dtype != first.dtype or not part.is_contiguous():
            return None
        size, sizes[dim] = sizes[dim], 0
        if sizes[:dim] != shape[:dim] or sizes[dim:][1:] != shape[dim:][1:]:
            return None
        shape[dim] += size
    return first.new_empty(shape)


def _convolve(layer: nn.Module, x: Tensor) -> Shape | None:
    """Find the shape that a convolution gives, of what it pads with zeros."""
    assert isinstance(layer, nn.modules.conv._ConvNd)
    weight = layer._parameters.get("weight")  # None where it is computed
    if weight is None or weight.dtype != x.dtype or layer.padding_mode != "zeros" or not x.is_contiguous():
        return None
    written, read, *kernel = weight.shape
    if x.dim() != len(kernel) + 2 or x.shape[1] != read * layer.groups or isinstance(layer.padding, str):
        return None
    sizes = [
        (size + 2 * padding - dilation * (extent - 1) - 1) // stride + 1
        for size, extent, stride, padding, dilation in zip(
            x.shape[2:], kernel, layer.stride, layer.padding, layer.dilation, strict=True
        )
    ]
    return (x.shape[0], written, *sizes) if min(sizes) > 0 else None


def _project(layer: nn.Module, x: Tensor) -> Shape:
    """Find the shape that a linear layer gives."""
    assert isinstance(layer, nn.Linear)
    if x.shape[-1] != layer.in_features:
        raise ValueError(f"it reads {layer.in_features} features, not {x.shape[-1]}")
    return (*x.shape[:-1], layer.out_features)


def _pool_adaptively(layer: nn.Module, x: Tensor) -> Shape | None:
    """Find the shape that adaptive pooling of images gives."""
    assert isinstance(layer, nn.AdaptiveAvgPool2d)
    return _pool(x.shape, layer.output_size, 2) if x.is_contiguous() and x.dim() in (3, 4) else None


def _pool(shape: Shape, sizes: Any, ndim: int) -> Shape:
    """Replace the last dimensions by others; None stands for what was there."""
    others = sizes if isinstance(sizes, tuple | list) else (sizes,) * ndim
    ends = zip(shape[-ndim:], others, strict=True)
    return (*shape[:-ndim], *(size if other is None else int(other) for size, other in ends))


# Exactly these: a subclass may do something else.
LAYERS: dict[type[nn.Module], Callable[[nn.Module, Tensor], Shape | None]] = {
    nn.Conv1d: _convolve,
    nn.Conv2d: _convolve,
    nn.Conv3d: _convolve,
    nn.Linear: _project,
    nn.AdaptiveAvgPool2d: _pool_adaptively,
}
