"""Learned static gates: hard 0/1 masks on stock layers' weights, trained by gradient descent.

A gate is a parametrization, so a gated model is still the same model, and folding is removing it. The
forward is the step 1[s > 0] of a score s; its gradient is replaced by that of a logistic curve scaled to
slope 1 at the threshold, 4·σ(s)·(1 − σ(s)). The gradient of a closed gate does not vanish, so that gates
re-open where the loss asks for it. GNAP (arXiv 2603.19759) does not publish its gate: this one is ours; the
straight-through idea is Bengio et al., arXiv 1308.3432.
"""

import copy
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from elastic.errors import StructureError
from elastic.widths.discovery import Widths
from elastic.widths.parameters import ChannelParametrization, get_original, get_weight
from elastic.widths.tracing import find_following_norms

Grain = Literal["weight", "kernel", "channel"]
START = 1.0
AGAIN = 0.3  # the score of a gate that is opened again
EDGE = 1e-3  # a settled gate is at least so far from the threshold


class _Step(torch.autograd.Function):
    """weight · 1[score > 0], with the surrogate gradient for the score."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(weight, score)
        return weight * (score > 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, score = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:  # frozen
            return grad * (score > 0), None
        sigma = torch.sigmoid(score)
        slope = 4 * sigma * (1 - sigma)
        return grad * (score > 0), slope * (grad * weight).sum_to_size(score.shape)


class Gate(ChannelParametrization):
    """One score for each weight, each kernel (one out×in slice) or each output channel of a weight.

    `grace` counts the epochs for which an entry is spared the penalty: fresh channels get no gradient at
    first and would lose against it. `price` is the cost of one weight, see `penalty`.
    """

    score: nn.Parameter
    grace: Tensor

    def __init__(self, weight: Tensor, grain: Grain, grace: int = 0) -> None:
        super().__init__()
        kept = {"weight": weight.dim(), "kernel": 2, "channel": 1}[grain]
        shape = [n if d < kept else 1 for d, n in enumerate(weight.shape)]
        self.dims = frozenset(range(kept))
        self.fresh = {"score": START, "grace": float(grace)}
        self.price = 1.0
        self.score = nn.Parameter(weight.new_full(shape, START))
        self.register_buffer("grace", torch.zeros_like(self.score))

    def forward(self, weight: Tensor) -> Tensor:
        score = self.score.view(-1) if weight.dim() == 1 else self.score
        return _Step.apply(weight, score)


def attach_gates(model: nn.Module, widths: Widths, grain: Grain, grace: int = 0) -> None:
    """Gate the convolutions and linear layers that the model's widths reach, in place.

    At channel grain the gain and shift of the norm that follows a layer are gated with it, so that a closed
    channel is exactly zero; channels that cannot be removed (the logits) are not gated.
    """
    if grain not in get_args(Grain):
        raise StructureError(f"gates have no grain '{grain}': choose {', '.join(get_args(Grain))}")
    roles = ("out",) if grain == "channel" else ("out", "in")
    slots = {s.module: None for w in widths.values() for role in roles for s in w.slots_with(role)}  # type: ignore[arg-type]
    followers = find_following_norms(model) if grain == "channel" else {}
    for path in slots:
        layer = model.get_submodule(path)
        if not get_weight(layer).requires_grad:  # a user has frozen it
            continue
        gate = Gate(get_weight(layer), grain, grace)
        parametrize.register_parametrization(layer, "weight", gate)
        tied = [(layer, "bias")] if grain == "channel" else []
        if path in followers:
            tied += [(model.get_submodule(followers[path]), name) for name in ("weight", "bias")]
        for module, tensor in tied:
            if getattr(module, tensor) is not None:
                parametrize.register_parametrization(module, tensor, gate)


def iterate_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Gate]]:
    """Every gate once, with the path and the layer whose weight it gates."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            chain: Any = module.parametrizations["weight"]
            for gate in chain:  # a norm's gate is that of the layer before
                if isinstance(gate, Gate) and id(gate) not in seen and chain.original.dim() > 1:
                    seen.add(id(gate))
                    yield path, module, gate


def find_grain(model: nn.Module) -> Grain | None:
    """Return the grain of a model's gates, None where there are none."""
    dims = [(len(gate.dims), get_weight(layer).dim()) for _, layer, gate in iterate_gates(model)]
    if not dims:
        return None
    if all(kept == 1 for kept, _ in dims):
        return "channel"
    return "kernel" if all(kept == 2 < of_weight for kept, of_weight in dims if of_weight > 2) else "weight"


def compute_penalty(model: nn.Module) -> Tensor:
    """Σ price · size · σ(score): how many weights (at price 1) or MACs the gates mean to keep.

    `size` is the number of weights behind one score. Entries in their grace period do not count.
    """
    terms = []
    for _, layer, gate in iterate_gates(model):
        terms.append(_worth(layer, gate) * (torch.sigmoid(gate.score) * (gate.grace <= 0)).sum())
    return torch.stack(terms).sum()


def _worth(layer: nn.Module, gate: Gate) -> float:
    """Price times the number of weights behind one score of the layer's gate."""
    return gate.price * get_weight(layer).numel() / gate.score.numel()


def measure_openness(model: nn.Module, widths: Widths) -> dict[str, float]:
    """For each width, the share of gates that are open in the layers that write and read it."""
    opens = {path: (gate.score > 0).float().mean().item() for path, _, gate in iterate_gates(model)}
    found = {}
    for name, width in widths.items():
        held = [opens[s.module] for s in width.slots if s.tensor == "weight" and s.module in opens]
        found[name] = sum(held) / len(held) if held else 1.0
    return found


def advance_grace(model: nn.Module) -> None:
    """One epoch of grace has passed."""
    for _, _, gate in iterate_gates(model):
        gate.grace.sub_(1).clamp_(min=0)


def freeze_gates(model: nn.Module) -> None:
    """Gates stay as they are from here on; the weights behind them go on learning."""
    for _, _, gate in iterate_gates(model):
        gate.score.requires_grad_(False)
        gate.score.grad = None


def keep_best_gates(model: nn.Module, count: float) -> None:
    """Open the gates of highest score as far as `count` allows, and close the rest.

    A weight counts its gate's price, 1 unless the penalty is on MACs. Of every layer the best gate stays.
    """
    held = [(gate, _worth(layer, gate)) for _, layer, gate in iterate_gates(model)]
    scores = torch.cat([gate.score.detach().flatten() for gate, _ in held])
    counts = [gate.score.numel() for gate, _ in held]
    per_gate = torch.cat([torch.full((gate.score.numel(),), worth) for gate, worth in held])
    best = torch.cat([part.argmax()[None] for part in scores.split(counts)])
    best += torch.tensor([0, *counts[:-1]], device=best.device).cumsum(0)
    order = scores.index_fill(0, best, torch.inf).sort(descending=True, stable=True).indices.cpu()
    stays = torch.zeros(len(scores), dtype=torch.bool)
    stays[order] = per_gate[order].cumsum(0) <= count
    stays[best.cpu()] = True
    for (gate, _), open_ in zip(held, stays.split(counts), strict=True):
        score = gate.score.detach()
        mask = open_.view(score.shape).to(score.device)
        gate.score.data = torch.where(mask, score.clamp(min=EDGE), score.clamp(max=-EDGE))


@torch.no_grad()
def reopen_gates(model: nn.Module, least: float) -> None:
    """Open shut gates, of highest score first, until about `least` weights (Σ price) stay, and one a layer.

    Penalties shut gates that are alike in the same few steps. A layer whose gates are all shut passes nothing
    on, and no gradient comes that could open one again.
    """
    if least == 0 and all((gate.score > 0).any() for _, _, gate in iterate_gates(model)):
        return
    held = {gate: gate.score.detach().clone() for _, _, gate in iterate_gates(model)}
    keep_best_gates(model, least)
    for gate, score in held.items():
        again = (score <= 0) & (gate.score > 0)
        gate.score.data = score.masked_fill_(again, AGAIN)  # in the memory format it had


def fold_gates(model: nn.Module) -> nn.Module:
    """A copy whose weights hold what the gates left of them: a plain model."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if parametrize.is_parametrized(module):
            # parametrize.remove_parametrizations would strip the class, which the copy shares.
            chains: Any = module.parametrizations
            values = {
                name: nn.Parameter(getattr(module, name).detach().clone(), chain.original.requires_grad)
                for name, chain in chains.items()
            }
            del module._modules["parametrizations"]
            module.__class__ = type(module).__bases__[0]
            rest = dict(module._parameters)
            module._parameters.clear()
            for tensor, value in values.items():
                module.register_parameter(tensor, value)
            module._parameters.update(rest)
    return plain


def compute_mask(layer: nn.Module, tensor: str) -> Tensor:
    """What the gates of a layer's tensor let through: 1 or 0 an entry, 1 where there is no gate."""
    held = get_original(layer, tensor)
    assert held is not None
    mask = torch.ones_like(held)
    if parametrize.is_parametrized(layer, tensor):
        for gate in layer.parametrizations[tensor]:  # type: ignore[index,union-attr]
            mask = gate(mask)
    return mask.detach()


def count_open(model: nn.Module) -> float:
    """Σ price over the weights that open gates keep."""
    return sum(
        gate.price * int(compute_mask(layer, "weight").sum()) for _, layer, gate in iterate_gates(model)
    )


def count_gated(model: nn.Module) -> float:
    """Σ price over all gated weights."""
    return sum(gate.price * get_weight(layer).numel() for _, layer, gate in iterate_gates(model))
