"""Copy a model without its data."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from elastic.errors import StructureError

BATCH_NORM = nn.modules.batchnorm._BatchNorm
# Layers whose output has the shape of their input, and which are slow on the meta device.
KEEPS_SHAPE = (
    BATCH_NORM,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Dropout,
    nn.Sigmoid,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.SiLU,
    nn.GELU,
)


def _keep_shape(input: Tensor) -> Tensor:
    """Stand for an operation whose output has the shape of its input."""
    return input.detach()


def make_meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model without its data: every tensor is on the meta device.

    Shapes are all that is asked of the copy: some of torch's own layers, slow on that device, only keep them.
    """
    _refuse_compiled(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise StructureError(
                "a lazy layer has no shape yet: run the model once, then discover its widths"
            )
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    attributes = (value for module in model.modules() for value in vars(module).values())
    for tensor in (*model.buffers(), *(value for value in attributes if isinstance(value, Tensor))):
        memo[id(tensor)] = tensor.to("meta")
    replica = _copy_modules(model, memo)
    for module in replica.modules():
        kind = parametrize.type_before_parametrizations(module)
        if isinstance(module, KEEPS_SHAPE) and kind.__module__.startswith("torch.nn."):
            vars(module)["forward"] = _keep_shape
    return replica


def _refuse_compiled(model: nn.Module) -> None:
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


def _copy_modules(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a model as `copy.deepcopy` does, in less time where its modules leave their copying to Python."""
    modules = list(model.modules())
    if not all(map(_is_copied_by_default, modules)):
        return copy.deepcopy(model, memo)
    for module in modules:
        memo[id(module)] = object.__new__(type(module))
    for module in modules:
        vars(memo[id(module)]).update(
            (name, _copy_value(value, memo)) for name, value in module.__getstate__().items()
        )
    replica: nn.Module = memo[id(model)]
    return replica


def _is_copied_by_default(module: nn.Module) -> bool:
    kind = type(module)
    if hasattr(kind, "__deepcopy__") and not parametrize.is_parametrized(module):
        return False
    is_default = (kind.__reduce_ex__, kind.__getstate__) == (object.__reduce_ex__, nn.Module.__getstate__)
    return is_default and kind.__setstate__.__module__.startswith("torch.nn.")  # which mends old files


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) in (int, float, bool, str, type(None)):
        return value
    if type(value) is OrderedDict and not value:  # of hooks
        return OrderedDict()
    if type(value) is dict:
        return {
            key: memo[id(part)] if id(part) in memo else _copy_value(part, memo)
            for key, part in value.items()
        }
    return copy.deepcopy(value, memo)
