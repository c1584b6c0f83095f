"""What a model costs. The counting rules are the same wherever a number is shown.

`params`: scalars needed at inference that are not zero (weights, biases, norm affine), buffers not
counted; a gated weight counts where its gate is open. `params_dense`: the same, allocated. `macs`:
multiply-accumulates of convolutions and matrix products for one input, as dense kernels execute them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from elastic.gates import Gate
from elastic.trace import on_meta
from elastic.widths import Widths


@dataclass(frozen=True)
class Census:
    """What the network is made of now."""

    params: int
    params_dense: int
    macs: int
    widths: dict[str, int]


def census(model: nn.Module, widths: Widths, example: Tensor) -> Census:
    return Census(params(model), params_dense(model), macs(model, example), widths.sizes())


@torch.no_grad()
def params(model: nn.Module) -> int:
    return sum(int(tensor.count_nonzero()) for tensor in _effective(model))


@torch.no_grad()
def params_dense(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in _effective(model))


def _effective(model: nn.Module) -> list[Tensor]:
    """Every parameter once, as inference sees it: gates applied, their scores left out."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, (parametrize.ParametrizationList, Gate)):
            continue
        for tensor in module._parameters:
            held = getattr(module, tensor)
            if held is not None:
                found[id(held)] = held
        if parametrize.is_parametrized(module):
            for tensor in module.parametrizations:  # type: ignore[union-attr]
                found[id(module.parametrizations[tensor].original)] = getattr(module, tensor)  # type: ignore
    return list(found.values())


def macs(model: nn.Module, example: Tensor) -> int:
    """Counted by torch's FlopCounterMode (2 FLOPs a MAC) on the meta device: nothing is computed."""
    return sum(macs_by_layer(model, example).values())


def macs_by_layer(model: nn.Module, example: Tensor) -> dict[str, int]:
    """The MACs of each layer that has any, by its path."""
    twin = on_meta(model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(example.new_empty((1, *example.shape[1:]), device="meta"))
    leaves = {path for path, module in twin.named_modules() if isinstance(module, _COUNTED)}
    found = {}
    for path, counts in counter.get_flop_counts().items():
        name = path.partition(".")[2]
        if name in leaves:
            found[name] = sum(counts.values()) // 2
    counted = sum(counter.get_flop_counts().get("Global", {}).values()) // 2
    if rest := counted - sum(found.values()):
        found[""] = rest
    return found


_COUNTED = (nn.modules.conv._ConvNd, nn.Linear)
