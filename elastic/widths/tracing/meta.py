"""Copy a model without its data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributions import Distribution
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._pytree import tree_leaves, tree_map

from elastic.errors import StructureError
from elastic.widths.copying import copy_module
from elastic.widths.parameters import get_kind, list_spectral_norms
from elastic.widths.tracing.checks import PassingChecks
from elastic.widths.tracing.shapes import infer_call, infer_each, infer_layer, infer_norm

# What makes tensors of numbers that a forward may compute sizes with; they have at most so many.
NUMBERS, FEW = (torch.tensor, torch.as_tensor, torch.arange), 16
MOVES = ("to", "cpu", "cuda")
FORWARD = "forward"
BATCH_NORM = nn.modules.batchnorm._BatchNorm
# They count batches, and have vectors, perhaps of one entry: no forward decides by those.
NORMS = (nn.modules.batchnorm._NormBase, _SpectralNorm)


_Forward = Callable[..., Tensor]


def _unless_traced(stand_in: _Forward) -> _Forward:
    """Let a layer whose forward a network calls itself, `self.norm.forward(x)`, be looked into."""

    @wraps(stand_in)
    def forward(layer: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_traced = issubclass(type(input), fx.Proxy)
        result: Tensor = (type(layer).forward if is_traced else stand_in)(layer, input, *args, **kwargs)
        return result

    return forward


@_unless_traced
def _work_on_each(layer: nn.Module, input: Tensor) -> Tensor:
    """Stand for a layer that works entry by entry."""
    known = infer_each(input)
    return type(layer).forward(layer, input) if known is None else known


@_unless_traced
def _normalize(layer: nn.Module, input: Tensor) -> Tensor:
    """Stand for batch and group norm."""
    return infer_norm(input)


@_unless_traced
def _normalize_layer(layer: nn.Module, input: Tensor) -> Tensor:
    """Stand for layer norm, whose output lies in the usual order."""
    return input.new_empty(input.shape)


@_unless_traced
def _transpose(layer: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stand for a transposed convolution, which takes any number of channels on the meta device."""
    channels = input.shape[-1 - len(layer.kernel_size)]
    if channels != layer.in_channels:
        raise RuntimeError(
            f"{type(layer).__name__} takes {layer.in_channels} channels, and was given {channels}"
        )
    result: Tensor = type(layer).forward(layer, input, *args, **kwargs)
    return result


# Layers whose output has the shape of their input, and which are slow on the meta device; and one that
# misses there what does not fit.
STAND_INS: dict[type[nn.Module], _Forward] = {
    _ConvTransposeNd: _transpose,
    BATCH_NORM: _normalize,
    nn.GroupNorm: _normalize,
    nn.LayerNorm: _normalize_layer,
    nn.Dropout: _work_on_each,
    nn.Sigmoid: _work_on_each,
    nn.ReLU: _work_on_each,
    nn.ReLU6: _work_on_each,
    nn.Hardswish: _work_on_each,
    nn.Hardsigmoid: _work_on_each,
    nn.Hardtanh: _work_on_each,
    nn.SiLU: _work_on_each,
    nn.GELU: _work_on_each,
}


def make_meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model without its data: every tensor is on the meta device.

    Shapes are all that is asked of the copy: some of torch's own layers, slow on that device, only keep them.
    """
    refuse_compiled(model)
    memo: dict[int, Any] = {}
    for module in model.modules():
        _replace_tensors(module, memo)
    replica = copy_module(model, memo)
    for module in replica.modules():
        forward = None if has_own_forward(module) else _find_forward(get_kind(module))  # type: ignore[arg-type]
        if forward is not None:
            vars(module)[FORWARD] = MethodType(forward, module)
    return replica


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether a program has put a function of its own in the place of a module's forward."""
    forward = vars(module).get(FORWARD)
    return forward is not None and getattr(forward, "__func__", None) not in STAND_INS.values()


def drop_data(value: Any) -> Any:
    """Bring a tensor to the meta device; leave anything else as it is."""
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def compute_without_data(
    node: fx.Node, layer: nn.Module | None, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Compute what an operation gives of tensors on the meta device; nothing is called that is known.

    Args:
        layer: the one that the node calls, if it calls one.
    """
    target: Any = node.target
    if layer is not None:
        value = infer_layer(layer, args, kwargs)
        args, kwargs = tree_map(drop_data, (args, kwargs))  # a forward may make what it is given
        return layer(*args, **kwargs) if value is None else value
    if (value := infer_call(target, args, kwargs)) is not None:
        return value
    if node.op == "call_method":
        if target in MOVES and isinstance(args[0], Tensor):
            return _convert(*args, **kwargs)
        if target == "type" and isinstance(args[0], Tensor):
            return _tell_type(*args, **kwargs)
        return _call(
            lambda owner, *arguments, **named: getattr(owner, target)(*arguments, **named), args, kwargs
        )
    value = _call(target, args, kwargs)
    return value if _holds_numbers(value) else drop_data(value)


def _convert(
    x: Tensor,
    *args: Any,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    **_: Any,
) -> Tensor:
    """Change the type of a tensor, and leave it where it is: a model without data says where it was."""
    types = [value.dtype if isinstance(value, Tensor) else value for value in (*args, dtype)]
    dtype = next((value for value in types if isinstance(value, torch.dtype)), x.dtype)
    return x.to(dtype, memory_format=memory_format)


def _tell_type(x: Tensor, dtype: Any = None, **_: Any) -> Any:
    """Name the type of a tensor, or change it: by a name, `torch.cuda.FloatTensor`, it is one on a device."""
    if dtype is None:
        return x.new_empty(0, device="cpu").type()
    if isinstance(dtype, str):
        dtype = torch.empty(0).type(dtype.replace("torch.cuda.", "torch.")).dtype
    return _convert(x, dtype)


def _call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a function where tensors without data meet those that a forward makes, which have some."""
    are_meta = {leaf.is_meta for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    if function in NUMBERS and "device" in kwargs:
        kwargs = kwargs | {"device": "meta" if True in are_meta else "cpu"}
    given = args, kwargs
    if len(are_meta) == 2:
        args, kwargs = tree_map(_drop_entries, given)
    try:
        return function(*args, **kwargs)
    except RuntimeError:  # torch asks for a number's value: no size is a fraction
        args, kwargs = tree_map(_stand_in, given)
        return function(*args, **kwargs)


def _drop_entries(value: Any) -> Any:
    """Drop data, but for a whole number, which may be a size, or say which dimension is meant."""
    is_number = isinstance(value, Tensor) and not value.dim() and not value.is_floating_point()
    return value if is_number else drop_data(value)


def _stand_in(value: Any) -> Any:
    """Let any number stand for one without data that is no whole number, such as what fills a tensor.

    A whole number may be a size, also where it is the one entry of a tensor.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        return drop_data(value)
    if value.is_floating_point():
        return 1.0 if value.is_meta and not value.dim() else drop_data(value)
    return value if value.is_meta else value.item()


def _holds_numbers(value: Any) -> bool:
    """Tell whether a tensor holds few numbers, such as an order of dimensions: shapes depend on them."""
    return isinstance(value, Tensor) and value.numel() <= FEW


@contextmanager
def leave_out_checks() -> Iterator[None]:
    """Let a forward make distributions without asking whether their values may be."""
    before = Distribution._validate_args
    try:
        Distribution.set_default_validate_args(False)
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def run_without_data() -> Iterator[None]:
    """Let tensors without data meet those that a forward makes, which have some."""
    with leave_out_checks(), _WithoutData():
        yield


class _WithoutData(PassingChecks):
    """Call each function as a forward does that runs without data."""

    def call(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        return _call(func, args, kwargs)


def refuse_compiled(model: nn.Module) -> None:
    """Raise StructureError where a module is a compiled one, whose forward is not Python's any more."""
    for path, module in model.named_modules():
        name = path or type(model).__name__
        if "_orig_mod" in module._modules:
            raise StructureError(
                f"{name} is what torch.compile made of a module: give the module itself, and compile it in "
                "place by its method compile()"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise StructureError(f"{name} is a TorchScript module: give the module that it was made of")


def _replace_tensors(module: nn.Module, memo: dict[int, Any]) -> None:
    """Put tensors without data into the memo of a copy, in place of a module's own."""
    for parameter in module._parameters.values():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise StructureError(
                "a lazy layer has no shape yet: run the model once, then discover its widths"
            )
        if parameter is not None and id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    is_norm = isinstance(module, NORMS) or bool(list_spectral_norms(module))
    for tensor in (*module._buffers.values(), *vars(module).values()):
        if isinstance(tensor, Tensor):
            memo[id(tensor)] = drop_data(tensor) if is_norm else _keep_number(tensor)


def _keep_number(tensor: Tensor) -> Tensor:
    """Bring a tensor to the meta device, but for a number, by which a forward may decide: `self.is_ready`."""
    is_number = not tensor.is_meta and tensor.numel() == 1
    return tensor.detach().cpu().clone() if is_number else drop_data(tensor)


def _find_forward(kind: type[nn.Module]) -> _Forward | None:
    """Find what stands for the forward of a layer of torch's own, if anything does."""
    if not kind.__module__.startswith("torch.nn."):
        return None
    return next((STAND_INS[base] for base in kind.__mro__ if base in STAND_INS), None)
