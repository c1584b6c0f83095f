"""Fresh channels that get the largest gradient: GradMax (Evci et al., arXiv 2201.05125).

The paper sets a new neuron's incoming weights to zero and chooses the outgoing ones, by a singular value
decomposition, so that the gradient's norm is largest. Behind batch norm and ReLU a channel of zeros has no
usable gradient, so this is its mirror image: outgoing weights are zero (the function is preserved exactly),
and the incoming ones are the directions for which the outgoing weights' gradient is largest. The directions
are sought, to first order, among random orthonormal candidates, on a copy of the network.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic.fresh import Patch, zero_out
from elastic.stored import original
from elastic.surgery import grow_index, reindex
from elastic.widths import Width, Widths

HE = 2**0.5  # the expected length of a He-normal row, whatever its fan-in


@dataclass(frozen=True)
class Rows:
    """Writes given rows, (channels, in, …) a layer at its old fan-in, into the fresh channels."""

    rows: Mapping[str, Tensor]

    def __call__(self, patch: Patch, generator: torch.Generator) -> Tensor:
        weight = zero_out(patch, generator)
        given = self.rows.get(patch.layer)
        if given is None:
            return weight
        old = (patch.in_source >= 0).nonzero().flatten()
        fresh = torch.zeros_like(weight[patch.fresh_out])
        fresh[:, old] = given.to(weight)
        return weight.index_copy(0, patch.fresh_out.nonzero().flatten(), fresh)


def gradmax(
    model: nn.Module,
    widths: Widths,
    added: Mapping[str, int],
    loss: Callable[[nn.Module], Tensor],
    generator: torch.Generator,
    candidates: int = 64,
) -> Rows:
    """The strategy to grow with, for a batch's loss.

    Args:
        added: fresh channels for each width that grows.
        loss: the loss of a model on that batch.
        candidates: directions tried a width; with as many as the fan-in has entries the search is complete.
    """
    rows: dict[str, Tensor] = {}
    for name, by in added.items():
        if all(widths.positions(slot, name).shape[1] == 1 for slot in widths[name].role("out")):
            rows |= _best(model, widths, widths[name], by, loss, generator, candidates)
    return Rows(rows)


def _best(
    model: nn.Module,
    widths: Widths,
    width: Width,
    by: int,
    loss: Callable[[nn.Module], Tensor],
    generator: torch.Generator,
    candidates: int,
) -> dict[str, Tensor]:
    """Unit directions in the joint fan-in of all layers that write the width, best first, cut by layer."""
    writers = {
        slot.module: original(model.get_submodule(slot.module), "weight") for slot in width.role("out")
    }
    shapes = {path: weight.shape[1:] for path, weight in writers.items() if weight is not None}
    fan_in = sum(shape.numel() for shape in shapes.values())
    count = max(by, min(candidates, fan_in))
    tried = torch.randn(fan_in, min(count, fan_in), generator=generator)
    tried = torch.linalg.qr(tried).Q.T
    if count > fan_in:
        more = torch.randn(count - fan_in, fan_in, generator=generator)
        tried = torch.cat([tried, more / more.norm(dim=1, keepdim=True)])

    probe, grown = copy.deepcopy(model), copy.deepcopy(widths)
    reindex(probe, grown, {width.name: grow_index(width.size, count)}, fresh=Rows(_cut(tried * HE, shapes)))
    probe.zero_grad()
    loss(probe).backward()
    gradients = []
    for slot in width.role("in"):
        weight = original(probe.get_submodule(slot.module), "weight")
        assert weight is not None and weight.grad is not None
        places = grown.positions(slot, width.name)[width.size :]
        gradient = weight.grad[:, places.flatten()].unflatten(1, places.shape)
        gradients.append(gradient.transpose(0, 1).flatten(1))  # (candidates, all that reads them)
    directions = torch.linalg.svd(torch.cat(gradients, 1).cpu().float(), full_matrices=True).U.T[:by]
    best = directions @ tried
    return _cut(HE * best / best.norm(dim=1, keepdim=True), shapes)


def _cut(rows: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    parts = rows.split([shape.numel() for shape in shapes.values()], dim=1)
    return {path: part.reshape(-1, *shapes[path]) for path, part in zip(shapes, parts, strict=True)}
