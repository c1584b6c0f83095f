"""Copy a model without its data."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from elastic.errors import StructureError

BATCH_NORM = nn.modules.batchnorm._BatchNorm
# Layers whose output has the shape of their input, and which are slow on the meta device.
KEEPS_SHAPE = (BATCH_NORM, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.SiLU, nn.GELU)


def make_meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model without its data: every tensor is on the meta device.

    Shapes are all that is asked of the copy: some of torch's own layers, slow on that device, only keep them.
    """
    memo: dict[int, Tensor] = {}
    for parameter in model.parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise StructureError(
                "a lazy layer has no shape yet: run the model once, then discover its widths"
            )
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    attributes = (value for module in model.modules() for value in vars(module).values())
    for tensor in (*model.buffers(), *(value for value in attributes if isinstance(value, Tensor))):
        memo[id(tensor)] = tensor.to("meta")
    replica = copy.deepcopy(model, memo)
    for module in replica.modules():
        kind = parametrize.type_before_parametrizations(module)
        if isinstance(module, KEEPS_SHAPE) and kind.__module__.startswith("torch.nn."):
            vars(module)["forward"] = torch.empty_like
    return replica
