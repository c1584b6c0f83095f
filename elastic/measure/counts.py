"""Count what a model costs, by the same rules wherever a number is shown.

`params`: scalars needed at inference that are not zero (weights, biases, norm affine), buffers not
counted; a gated weight counts where its gate is open. `params_dense`: the same, allocated. `macs`:
multiply-accumulates of convolutions and matrix products for one input, as dense kernels execute them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from elastic.widths.hooks import quiet_hooks
from elastic.widths.inputs import Example, count_batch, list_inputs, select_samples
from elastic.widths.matching import require_widths
from elastic.widths.mode import set_mode
from elastic.widths.parameters import (
    ChannelParametrization,
    get_original,
    get_weight,
    get_weight_name,
    list_chains,
)
from elastic.widths.tracing import drop_data, make_meta_copy, run_without_data
from elastic.widths.width import Widths

Size = Sequence[int]
COUNTED = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class Census:
    """Hold what the network is made of now."""

    params: int
    params_dense: int
    macs: int
    widths: dict[str, int]


def census(model: nn.Module, widths: Widths, *example: Tensor) -> Census:
    """Count parameters, MACs (of one input, or one of each where the network takes several) and channels."""
    require_widths(model, widths)
    return Census(count_params(model), count_params_dense(model), count_macs(model, *example), widths.sizes())


@torch.no_grad()
def count_params(model: nn.Module) -> int:
    """Count the scalars that inference needs and that are not zero: weights, biases, norm affine."""
    return int(count_nonzero(list_effective_tensors(model)))


def count_nonzero(tensors: Iterable[Tensor]) -> Tensor:
    """Count what is not zero in all tensors together, but leave the number on their device."""
    counts = [tensor.count_nonzero() for tensor in tensors]
    return torch.stack(counts).sum() if counts else torch.tensor(0)


@torch.no_grad()
def count_params_dense(model: nn.Module) -> int:
    """Count the scalars allocated for inference: gates apply to them, their scores do not count."""
    return sum(tensor.numel() for tensor in list_effective_tensors(model))


def list_effective_tensors(model: nn.Module) -> list[Tensor]:
    """List every parameter once, as inference sees it: gates applied, their scores left out."""
    return [getattr(module, name) for module, name in locate_parameters(model).values()]


def locate_parameters(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Locate every parameter once, by the id of what is stored: its module, and its name there."""
    locations: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        if isinstance(module, (parametrize.ParametrizationList, ChannelParametrization)):
            continue
        stored = {name: value for name, value in module._parameters.items() if value is not None}
        chains = {  # of weight norm's norm and direction, the latter
            name: getattr(chain, "original", getattr(chain, "original1", chain))
            for name, chain in list_chains(module).items()
        }
        locations |= {id(value): (module, name) for name, value in (stored | chains).items()}
    return locations


def count_macs(model: nn.Module, *example: Tensor) -> int:
    """Count multiply-accumulates, by torch's FlopCounterMode (2 FLOPs a MAC) on the meta device."""
    return sum(count_macs_by_layer(model, *example).values())


def count_macs_by_layer(model: nn.Module, *example: Tensor) -> dict[str, int]:
    """Count the MACs of each layer that has any, by its path; those outside of layers are under "".

    A network that takes no single input (of clips, say, whose frames lie in the batch) is given all.
    """
    replica, batch = set_mode(make_meta_copy(model)), count_batch(example)
    try:
        single = select_samples(example, slice(1))
        return _count_macs(replica, [x.new_empty(x.shape, device="meta") for x in single])
    except Exception:  # the model's own forward runs here: anything may come
        if batch == 1:
            raise
    macs = _count_macs(replica, [drop_data(x) for x in example])
    return {path: count // batch for path, count in macs.items()}


def _count_macs(replica: nn.Module, inputs: Sequence[Tensor]) -> dict[str, int]:
    counter = FlopCounterMode(display=False, custom_mapping=_list_counters())
    with torch.no_grad(), quiet_hooks(replica), run_without_data(), counter:
        replica(*inputs)
    leaves = {path for path, module in replica.named_modules() if _is_layer(module)}
    flops = {path.partition(".")[2]: sum(by_op.values()) for path, by_op in counter.get_flop_counts().items()}
    macs = {path: flops[path] // 2 for path in flops if path in leaves}
    if outside := counter.get_total_flops() // 2 - sum(macs.values()):
        macs[""] = outside
    return macs


def _list_counters() -> dict[Any, Callable[..., int]]:
    """List counters of FLOPs for what torch's does not know: torchvision's operation, where that is there."""
    deform = getattr(torch.ops.torchvision, "deform_conv2d", None)
    return {} if deform is None else {deform: _count_deformed}


def _count_deformed(_x: Size, weight: Size, *_: Any, out_shape: Size, **__: Any) -> int:
    """Count a deformable convolution as a convolution: what it reads between pixels is not counted."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _is_layer(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's layers, or one of a program's own with a weight to multiply."""
    weight = get_original(module, get_weight_name(module))
    has_parts = any(name != "parametrizations" for name, _ in module.named_children())
    is_own = not has_parts and isinstance(weight, Tensor) and weight.dim() > 1
    return is_own or isinstance(module, COUNTED)


def count_macs_per_weight(model: nn.Module, example: Example) -> dict[str, float]:
    """Count how often one input uses each weight of each layer that has any."""
    by_layer = count_macs_by_layer(model, *list_inputs(example))
    return {
        path: macs / get_weight(model.get_submodule(path)).numel() for path, macs in by_layer.items() if path
    }
