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

from elastic.widths.discovery import Widths
from elastic.widths.parameters import ChannelParametrization, get_weight
from elastic.widths.tracing import make_meta_copy


@dataclass(frozen=True)
class Census:
    """What the network is made of now."""

    params: int
    params_dense: int
    macs: int
    widths: dict[str, int]


def census(model: nn.Module, widths: Widths, example: Tensor) -> Census:
    """Count parameters, MACs (of one input) and channels."""
    return Census(count_params(model), count_params_dense(model), count_macs(model, example), widths.sizes())


@torch.no_grad()
def count_params(model: nn.Module) -> int:
    """Scalars that inference needs and that are not zero: weights, biases, norm affine."""
    return sum(int(tensor.count_nonzero()) for tensor in _effective(model))


@torch.no_grad()
def count_params_dense(model: nn.Module) -> int:
    """Scalars allocated for inference: gates apply to them, their scores are not counted."""
    return sum(tensor.numel() for tensor in _effective(model))


def _effective(model: nn.Module) -> list[Tensor]:
    """Every parameter once, as inference sees it: gates applied, their scores left out."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, (parametrize.ParametrizationList, ChannelParametrization)):
            continue
        for tensor in module._parameters:
            held = getattr(module, tensor)
            if held is not None:
                found[id(held)] = held
        if parametrize.is_parametrized(module):
            for tensor in module.parametrizations:  # type: ignore[union-attr]
                found[id(module.parametrizations[tensor].original)] = getattr(module, tensor)  # type: ignore
    return list(found.values())


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Counted by torch's FlopCounterMode (2 FLOPs a MAC) on the meta device: nothing is computed."""
    return sum(count_macs_by_layer(model, example).values())


def count_macs_by_layer(model: nn.Module, example: Tensor) -> dict[str, int]:
    """The MACs of each layer that has any, by its path."""
    twin = make_meta_copy(model).eval()
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


def count_macs_per_weight(model: nn.Module, example: Tensor) -> dict[str, float]:
    """For each convolution and linear layer, how often one input uses each of its weights."""
    by_layer = count_macs_by_layer(model, example)
    return {
        path: macs / get_weight(model.get_submodule(path)).numel() for path, macs in by_layer.items() if path
    }


_COUNTED = (nn.modules.conv._ConvNd, nn.Linear)
