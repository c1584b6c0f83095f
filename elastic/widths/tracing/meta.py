"""Copy a model without its data."""

import copy

import torch
from torch import Tensor, nn

from elastic.errors import StructureError

BATCH_NORM = nn.modules.batchnorm._BatchNorm


def make_meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model without its data: every tensor is on the meta device.

    Shapes are all that is asked of the copy: torch's own batch norms, slow on that device, only keep them.
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
        if isinstance(module, BATCH_NORM) and type(module).__module__.startswith("torch.nn."):
            vars(module)["forward"] = torch.empty_like
    return replica
