"""Copy modules, also those whose weights a hook computes (old `weight_norm`, `torch.nn.utils.prune`)."""

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def copy_module(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """Copy a module as `copy.deepcopy` does, which refuses tensors that autograd has computed."""
    memo = memo or {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(module, memo)
