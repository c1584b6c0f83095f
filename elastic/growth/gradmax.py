"""Start fresh channels so that they get the largest gradient: GradMax (Evci et al., arXiv 2201.05125).

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
from elastic.surgery.layers import list_tensors
from elastic.surgery.reindexing import grow_index, reindex
from elastic.widths.copying import copy_module
from elastic.widths.hooks import quiet_hooks
from elastic.widths.parameters import get_weight
from elastic.widths.width import Slot, Width, Widths

HE = 2**0.5  # the expected length of a He-normal row, whatever its fan-in
Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Rows:
    """Write rows, (channels, in, …) a layer at its old fan-in, into the fresh channels."""

    rows: Mapping[str, Tensor]

    def __call__(self, patch: Patch, generator: torch.Generator) -> Tensor:
        weight = zero_out(patch, generator)
        rows = self.rows.get(patch.layer)
        if rows is None:
            return weight
        fresh = torch.zeros_like(weight[patch.fresh_out])
        fresh[:, ~patch.fresh_in] = rows.to(weight)
        return weight.index_copy(0, patch.fresh_out.nonzero().flatten(), fresh)


def gradmax(
    model: nn.Module,
    widths: Widths,
    added: Mapping[str, int],
    loss: Loss,
    generator: torch.Generator,
    candidates: int = 64,
) -> Rows:
    """Find the strategy to grow with, for a batch's loss.

    Args:
        added: fresh channels for each width that grows.
        loss: the loss of a model on that batch.
        candidates: directions tried a width; with as many as the fan-in has entries the search is complete.
    """
    rows: dict[str, Tensor] = {}
    for name, count in added.items():
        writers, readers = (widths[name].slots_with(role) for role in ("out", "in"))
        if readers and any(_is_drawn(model, slot) for slot in writers) and all(map(_is_alone, writers)):
            probe = _Probe(model, widths, widths[name], loss)
            rows |= probe.split_by_layer(HE * _find_directions(probe, count, candidates, generator))
    return Rows(rows)


def _is_drawn(model: nn.Module, slot: Slot) -> bool:
    """Tell whether a strategy fills the fresh rows of what writes a width, as of an embedding none does."""
    return any(
        item.has_fresh_strategy for item in list_tensors(model.get_submodule(slot.module), slot.tensor)
    )


def _is_alone(slot: Slot) -> bool:
    """Tell whether a channel is one row of a layer, and no other width's are: one direction will do."""
    return [segment.repeat for segment in slot.layout if segment.width is not None] == [1]


def _orient(weight: Tensor, slot: Slot) -> Tensor:
    """Let a weight lie as (out, in, …)."""
    return weight.transpose(0, 1) if slot.is_transposed else weight


def _find_directions(probe: "_Probe", count: int, candidates: int, generator: torch.Generator) -> Tensor:
    """Find `count` unit directions in the joint fan-in of all layers that write the width, best first."""
    trials = _draw_orthonormal(min(candidates, probe.fan_in), probe.fan_in, generator)
    # Of a linear network the gradient is linear in the direction, and these singular vectors are the best.
    vectors = torch.linalg.svd(probe.compute_gradients(trials), full_matrices=False).U
    if len(vectors) > vectors.shape[1]:  # few weights read the width: all directions beyond are as good
        vectors = torch.linalg.qr(vectors, mode="complete").Q
    directions = vectors.T @ trials
    # The network is not linear, so what counts is measured: each direction or its opposite, and whether
    # together they do better than the best candidates as they are.
    norms = probe.compute_gradients(torch.cat([directions, -directions, trials])).norm(dim=1)
    norm_plus, norm_minus, norm_tried = norms.split([len(directions), len(directions), len(trials)])
    signed = torch.where((norm_plus >= norm_minus)[:, None], directions, -directions)
    norm_signed = torch.maximum(norm_plus, norm_minus)
    top = norm_tried.argsort(descending=True, stable=True)[:count]
    is_better = norm_signed[:count].square().sum() >= norm_tried[top].square().sum()
    best = signed[:count] if is_better else trials[top]
    # Channels beyond the fan-in's entries have no direction of their own.
    spare = torch.randn(max(0, count - len(trials)), probe.fan_in, generator=generator)
    return torch.cat([best, spare / spare.norm(dim=1, keepdim=True)])


def _draw_orthonormal(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, count, generator=generator)).Q.T


class _Probe:
    """Try directions for fresh channels of a width, on copies of the network.

    A direction is one row of all layers that write the width, flattened and set side by side.
    """

    def __init__(self, model: nn.Module, widths: Widths, width: Width, loss: Loss) -> None:
        self.model, self.widths, self.width, self.loss = model, widths, width, loss
        writers = {slot.module: slot for slot in width.slots_with("out") if _is_drawn(model, slot)}
        self.shapes = {
            path: _orient(get_weight(model.get_submodule(path)), slot).shape[1:]
            for path, slot in writers.items()
        }
        self.fan_in = sum(shape.numel() for shape in self.shapes.values())

    def compute_gradients(self, directions: Tensor) -> Tensor:
        """Compute the gradient of all that would read each of the channels: (channels, weights)."""
        replica, widths = copy_module(self.model), copy.deepcopy(self.widths)
        name, size = self.width.name, self.width.size
        rows = Rows(self.split_by_layer(HE * directions))
        reindex(replica, widths, {name: grow_index(size, len(directions))}, fresh=rows)
        replica.zero_grad()
        with quiet_hooks(replica):
            self.loss(replica).backward()
        gradients = []
        for slot in self.width.slots_with("in"):
            weight = get_weight(replica.get_submodule(slot.module))
            # There is none of what the loss does not see.
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            positions = widths.positions(slot, name)[size:]
            gradient = _orient(gradient, slot)[:, positions.flatten()].unflatten(1, positions.shape)
            gradients.append(gradient.transpose(0, 1).flatten(1))
        return torch.cat(gradients, 1).cpu().float()

    def split_by_layer(self, rows: Tensor) -> dict[str, Tensor]:
        """Split joint rows into those of each layer that writes the width."""
        parts = rows.split([shape.numel() for shape in self.shapes.values()], dim=1)
        pairs = zip(self.shapes.items(), parts, strict=True)
        return {path: part.reshape(-1, *shape) for (path, shape), part in pairs}
