"""What a model costs. The counting rules are the same wherever a number is shown.

`params`: scalars needed at inference that are not zero (weights, biases, norm affine), buffers not
counted; a gated weight counts where its gate is open. `params_dense`: the same, allocated. `macs`:
multiply-accumulates of convolutions and matrix products for one input, as dense kernels execute them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from elastic.gates import Gate, openings
from elastic.stored import weight_of
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
    """Count parameters, MACs (of one input) and channels."""
    return Census(params(model), params_dense(model), macs(model, example), widths.sizes())


@torch.no_grad()
def params(model: nn.Module) -> int:
    """Scalars that inference needs and that are not zero: weights, biases, norm affine."""
    return sum(int(tensor.count_nonzero()) for tensor in _effective(model))


@torch.no_grad()
def params_dense(model: nn.Module) -> int:
    """Scalars allocated for inference: gates apply to them, their scores are not counted."""
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


@torch.no_grad()
def live(model: nn.Module, widths: Widths) -> dict[tuple[str, str], Tensor]:
    """What gates leave alive of each tensor, by (layer, tensor): 1 or 0 an entry.

    An entry lives if its own gate is open and its channels are written and read by open gates.
    """
    slots = [slot for width in widths.values() for slot in width.slots if slot.tensor in ("weight", "bias")]
    masks = {(s.module, s.tensor): openings(model.get_submodule(s.module), s.tensor).cpu() for s in slots}
    before, now = -1.0, 0.0
    while now != before:  # a channel that dies may leave another one unread
        for name, width in widths.items():
            alive = torch.ones(width.size, dtype=torch.bool)
            biases = [slot for slot in width.slots if slot.tensor == "bias"]  # a constant is written, too
            for slots_ in (width.role("out") + biases, width.role("in")):
                open_ = torch.zeros(width.size, dtype=torch.bool)
                for slot in slots_:
                    lines = masks[slot.module, slot.tensor].transpose(0, slot.dim)
                    open_ |= lines.reshape(len(lines), -1).any(1)[widths.positions(slot, name)].any(1)
                alive &= open_
            for slot in width.slots:
                if (slot.module, slot.tensor) in masks:
                    dead = widths.positions(slot, name)[~alive].flatten()
                    masks[slot.module, slot.tensor].index_fill_(slot.dim, dead, 0)
        before, now = now, sum(float(mask.sum()) for mask in masks.values())
    return masks


@torch.no_grad()
def live_params(model: nn.Module, widths: Widths) -> int:
    """`params`, without what belongs to channels that gates have shut off."""
    masks = live(model, widths)
    dead = sum(
        int((getattr(model.get_submodule(path), tensor).cpu() != 0).logical_and(mask == 0).sum())
        for (path, tensor), mask in masks.items()
    )
    return params(model) - dead


def live_macs(model: nn.Module, widths: Widths, uses: Mapping[str, float]) -> float:
    """MACs of the weights alive, by the `uses` of `macs_per_weight`.

    At channel grain they are the compacted network's; at finer grains dense kernels do more.
    """
    masks = live(model, widths)
    return sum(times * float(masks[path, "weight"].sum()) for path, times in uses.items())


def macs_per_weight(model: nn.Module, example: Tensor) -> dict[str, float]:
    """For each convolution and linear layer, how often one input uses each of its weights."""
    by_layer = macs_by_layer(model, example)
    return {
        path: macs / weight_of(model.get_submodule(path)).numel() for path, macs in by_layer.items() if path
    }


_COUNTED = (nn.modules.conv._ConvNd, nn.Linear)
