"""Fresh channels that get the largest gradient: GradMax (Evci et al., arXiv 2201.05125).

The paper sets a new neuron's incoming weights to zero and chooses the outgoing ones, by a singular value
decomposition, so that the gradient's norm is largest. Behind batch norm and ReLU a channel of zeros has no
usable gradient, so this is its mirror image: outgoing weights are zero (the function is preserved exactly),
and the incoming ones are the directions for which the outgoing weights' gradient is largest: the singular
vectors over random orthonormal candidates, then the best by measurement, on copies of the network.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic.surgery.fresh import Patch, zero_out
from elastic.surgery.reindexing import grow_index, reindex
from elastic.widths.discovery import Width, Widths
from elastic.widths.parameters import get_weight

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
        if all(widths.positions(slot, name).shape[1] == 1 for slot in widths[name].slots_with("out")):
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
    writers = [slot.module for slot in width.slots_with("out")]
    shapes = {path: get_weight(model.get_submodule(path)).shape[1:] for path in writers}
    fan_in = sum(shape.numel() for shape in shapes.values())
    tried = torch.linalg.qr(torch.randn(fan_in, min(candidates, fan_in), generator=generator)).Q.T
    gradients = _gradients(model, widths, width, _cut(HE * tried, shapes), loss)
    directions = torch.linalg.svd(gradients, full_matrices=False).U.T @ tried
    # The network is not linear, so what counts is measured: each direction or its opposite, and whether
    # together they do better than the best candidates as they are.
    norms = _gradients(
        model, widths, width, _cut(HE * torch.cat([directions, -directions, tried]), shapes), loss
    ).norm(dim=1)
    plus, minus, plain = norms.split([len(directions), len(directions), len(tried)])
    signed = torch.where((plus >= minus)[:, None], directions, -directions)
    top = plain.argsort(descending=True, stable=True)[:by]
    better = torch.maximum(plus, minus)[:by].square().sum() >= plain[top].square().sum()
    spare = torch.randn(max(0, by - len(tried)), fan_in, generator=generator)
    best = signed[:by] if better else tried[top]
    return _cut(HE * torch.cat([best, spare / spare.norm(dim=1, keepdim=True)]), shapes)


def _gradients(
    model: nn.Module,
    widths: Widths,
    width: Width,
    rows: Mapping[str, Tensor],
    loss: Callable[[nn.Module], Tensor],
) -> Tensor:
    """The gradient of all that would read each of the given channels: (channels, weights)."""
    probe, grown = copy.deepcopy(model), copy.deepcopy(widths)
    count = len(next(iter(rows.values())))
    reindex(probe, grown, {width.name: grow_index(width.size, count)}, fresh=Rows(rows))
    probe.zero_grad()
    loss(probe).backward()
    gradients = []
    for slot in width.slots_with("in"):
        weight = get_weight(probe.get_submodule(slot.module))
        assert weight.grad is not None
        places = grown.positions(slot, width.name)[width.size :]
        gradient = weight.grad[:, places.flatten()].unflatten(1, places.shape)
        gradients.append(gradient.transpose(0, 1).flatten(1))
    return torch.cat(gradients, 1).cpu().float()


def _cut(rows: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    parts = rows.split([shape.numel() for shape in shapes.values()], dim=1)
    return {path: part.reshape(-1, *shapes[path]) for path, part in zip(shapes, parts, strict=True)}
