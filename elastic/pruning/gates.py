"""Gate stock layers' weights: hard 0/1 masks, trained by gradient descent.

A gate is a parametrization, so a gated model is still the same model, and folding is removing it. The
forward is the step 1[s > 0] of a score s; its gradient is replaced by that of a logistic curve scaled to
slope 1 at the threshold, 4·σ(s)·(1 − σ(s)). The gradient of a closed gate does not vanish, so that gates
re-open where the loss asks for it. GNAP (arXiv 2603.19759) does not publish its gate: this one is ours; the
straight-through idea is Bengio et al., arXiv 1308.3432.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from elastic.errors import OptionError, StructureError
from elastic.pruning.companions import find_companions
from elastic.widths.matching import require_widths
from elastic.widths.parameters import (
    ChannelParametrization,
    get_weight,
    get_weight_name,
    list_parametrizations,
    own_class,
)
from elastic.widths.width import Slot, Widths

Grain = Literal["weight", "kernel", "block", "channel"]
START = 1.0
BLOCK = 8  # outputs: as many as processors add into at once, while they hold what an input has for them
NO_BLOCK = -1  # of outputs that are fresh


class _Step(torch.autograd.Function):
    """Compute weight · 1[score > 0], with the surrogate gradient for the score, or for blocks of scores."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, block: Tensor | None, dim: int) -> Tensor:
        ctx.save_for_backward(weight, score, block)
        ctx.dim = dim
        return _mask(weight, score)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, score, block = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:  # frozen
            return _mask(grad, score), None, None, None
        pull = (grad * weight).sum_to_size(score.shape)
        slope = torch.ops.aten.sigmoid_backward(pull, torch.sigmoid(score))  # pull · σ · (1 − σ)
        slope = slope if block is None else average_blocks(slope, block, ctx.dim)
        return _mask(grad, score), slope.mul_(4), None, None


def _mask(values: Tensor, score: Tensor) -> Tensor:
    """Set to zero what lies behind closed gates.

    One operator, where a comparison and a product are two: each costs a launch, in every layer and step.
    """
    masked: Tensor = torch.ops.aten.threshold_backward(values, score, 0.0)
    return masked


def find_firsts(block: Tensor) -> Tensor:
    """Find, for each output, the first of its block: (outputs,)."""
    block_K = block.flatten()
    return (block_K[:, None] == block_K).int().argmax(1)


def average_blocks(values: Tensor, block: Tensor, dim: int) -> Tensor:
    """Average over each block of outputs, which lie on `dim`; all of a block get the very same number.

    Differences to the first of a block are averaged, so that what is equal stays as it is, to the last bit.
    """
    first_K = find_firsts(block)
    first = values.index_select(dim, first_K)
    sums = torch.zeros_like(values).index_add_(dim, first_K, values - first)
    sizes_K = torch.zeros_like(first_K).index_add_(0, first_K, torch.ones_like(first_K))
    return first + sums.index_select(dim, first_K) / sizes_K[first_K].view(block.shape)


class Gate(ChannelParametrization):
    """Mask a weight by one score for each entry, each kernel (one out×in slice) or each output channel.

    At block grain there is a score for each kernel, too, but what moves one moves all of its block, the same
    in of `BLOCK` outputs: they open and close together. `block` numbers them, and follows the outputs, so
    that surgery leaves all as it is; fresh outputs are given blocks of their own by `form_blocks`.
    `grace` counts the epochs for which an entry is spared the penalty: fresh channels get no gradient at
    first and would lose against it. `price` is the cost of one weight, see `add_penalty_gradient`.
    `is_frozen` keeps gradients from the score, whatever the program says of its parameters.
    """

    score: nn.Parameter
    grace: Tensor
    block: Tensor | None

    def __init__(self, weight: Tensor, grain: Grain, grace: int = 0, channel: int = 0) -> None:
        super().__init__()
        dims = {"weight": range(weight.dim()), "channel": (channel,)}.get(grain, range(2))
        self.dims, self.channel = frozenset(dims), channel
        shape = [size if dim in dims else 1 for dim, size in enumerate(weight.shape)]
        self.fresh = {"score": START}
        self.set_grace(grace)
        self.price = 1.0
        self.is_frozen = False
        self.score = nn.Parameter(weight.new_full(shape, START))
        self.register_buffer("grace", torch.zeros_like(self.score))
        block = None
        if grain == "block":
            self.fresh["block"] = NO_BLOCK
            outputs = torch.arange(weight.shape[channel], device=weight.device)
            block = (outputs // BLOCK).view([-1 if dim == channel else 1 for dim in range(weight.dim())])
        self.register_buffer("block", block)

    def set_grace(self, epochs: int) -> None:
        """Set for how many epochs fresh entries are spared the penalty."""
        self.fresh = {**self.fresh, "grace": float(epochs)}

    def get_dims(self, name: str) -> frozenset[int]:
        return frozenset({self.channel}) if name == "block" else self.dims

    def __call__(self, weight: Tensor) -> Tensor:
        """Compute without the hooks of all modules.

        Those of torch's FLOP counter ask what a module is given for its gradient's node, which no weight has
        in inference mode.
        """
        return self.forward(weight)

    def forward(self, weight: Tensor) -> Tensor:
        # What the program leaves out of a step, by Lightning's toggle_optimizer, its gates are left out of.
        is_trained = weight.requires_grad and not self.is_frozen
        score = self.score if is_trained else self.score.detach()
        score = score.view(-1) if weight.dim() == 1 else score
        if weight.dim() == 1 and len(weight) > len(score):  # a transposed convolution's groups share scores
            score = score.repeat(len(weight) // len(score))
        return _Step.apply(weight, score, self.block, self.channel)


def attach_gates(
    model: nn.Module, widths: Widths, grain: Grain, grace: int = 0, copies: Iterable[nn.Module] = ()
) -> None:
    """Gate the convolutions, linear layers and embeddings that widths reach, of a model and its copies.

    At channel grain what else has a scalar for each of a layer's channels (its bias, the norm that follows)
    is gated with it, so that a closed channel is exactly zero, see `elastic.pruning.companions`; channels
    that cannot be removed (the logits) are not gated.

    Raises:
        StructureError: no layer can have gates.
    """
    require_widths(model, widths)
    if grain not in get_args(Grain):
        raise OptionError(f"gates have no grain '{grain}': choose {', '.join(get_args(Grain))}")
    roles: tuple[Literal["out", "in"], ...] = ("out",) if grain == "channel" else ("out", "in")
    layers = {
        slot.module: slot for width in widths.values() for role in roles for slot in width.slots_with(role)
    }
    companions = find_companions(model, widths) if grain == "channel" else {}
    reasons = {path: why for path, slot in layers.items() if (why := _find_hindrance(model, widths, slot))}
    if layers.keys() == reasons.keys():
        raise StructureError(f"no layer can have gates: {'; '.join(dict.fromkeys(reasons.values()))}")
    for path, slot in layers.items():
        if path in reasons:
            continue
        channel = slot.dim if slot.role == "out" else 1 - slot.dim
        for root in (model, *copies):
            weight = get_weight(root.get_submodule(path))
            gate = Gate(weight, grain, grace, channel)
            gate.score.requires_grad_(weight.requires_grad)
            _register(root, [(path, slot.tensor), *companions.get(path, ())], gate)


def _find_hindrance(model: nn.Module, widths: Widths, slot: Slot) -> str | None:
    """Say what keeps a layer from having gates."""
    layer = model.get_submodule(slot.module)
    if slot.module in widths.untrained or not get_weight(layer).requires_grad:
        return "weights are frozen"
    if slot.module in widths.written:
        return "the forward changes weights, which a gate would hide from it"
    if slot.tensor in vars(layer):
        return "a hook computes weights: use weight_norm or spectral_norm of torch.nn.utils.parametrizations"
    return None


def _register(root: nn.Module, places: Iterable[tuple[str, str]], gate: Gate) -> None:
    """Let one gate mask several tensors, (layer, name), as far as the layers have them."""
    for path, tensor in places:
        layer = root.get_submodule(path)
        if getattr(layer, tensor, None) is not None:
            if parametrize.is_parametrized(layer):
                own_class(layer)  # else copies of the layer would lose the tensor
            parametrize.register_parametrization(layer, tensor, gate)


def iterate_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Gate]]:
    """Yield every gate once, with the path and the layer whose weight it gates."""
    visited: set[nn.Module] = set()
    for path, module in model.named_modules():
        for gate in list_parametrizations(module, get_weight_name(module)):
            # A norm's gate is that of the layer before.
            if isinstance(gate, Gate) and gate not in visited and get_weight(module).dim() > 1:
                visited.add(gate)
                yield path, module, gate


def find_grain(model: nn.Module) -> Grain | None:
    """Return the grain of a model's gates, None where there are none."""
    dims = [(len(gate.dims), get_weight(layer).dim()) for _, layer, gate in iterate_gates(model)]
    if not dims:
        return None
    if any(gate.block is not None for _, _, gate in iterate_gates(model)):
        return "block"
    if all(depth == 1 for depth, _ in dims):
        return "channel"
    return "kernel" if all(depth == 2 for depth, of_weight in dims if of_weight > 2) else "weight"


def compute_worth(layer: nn.Module, gate: Gate) -> float:
    """Compute the price of the weights behind one score of the layer's gate."""
    return gate.price * get_weight(layer).numel() / gate.score.numel()


def advance_grace(model: nn.Module) -> None:
    """Count one epoch of grace as over."""
    for _, _, gate in iterate_gates(model):
        gate.grace.sub_(1).clamp_(min=0)


@torch.no_grad()
def form_blocks(model: nn.Module) -> None:
    """Give fresh outputs blocks of their own: their scores are all alike, so that no gate moves.

    To be called after channels have grown, before the next step.
    """
    for _, _, gate in iterate_gates(model):
        if gate.block is None:
            continue
        block_K = gate.block.view(-1)
        is_fresh = block_K == NO_BLOCK
        places = is_fresh.cumsum(0) - 1
        block_K.copy_(torch.where(is_fresh, block_K.max() + 1 + places // BLOCK, block_K))


def freeze_gates(model: nn.Module) -> None:
    """Leave gates as they are from here on; the weights behind them go on learning.

    They stay as they are where a program calls `requires_grad_` of the whole network, too.
    """
    for _, _, gate in iterate_gates(model):
        gate.is_frozen = True
        gate.score.requires_grad_(False)
        gate.score.grad = None


def thaw_gates(model: nn.Module) -> None:
    """Let gates learn that an earlier fit has frozen, but for those of layers that are frozen themselves."""
    for _, layer, gate in iterate_gates(model):
        gate.is_frozen = False
        gate.score.requires_grad_(get_weight(layer).requires_grad)


def average_score(gate: Gate) -> Tensor:
    """Average a gate's scores over each block; those of other grains are given as they are."""
    score = gate.score.detach()
    return score if gate.block is None else average_blocks(score, gate.block, gate.channel)


def list_firsts(gate: Gate) -> Tensor:
    """List, for each entry of a score, which one is the first of its block, in the order of `flatten`."""
    places = torch.arange(gate.score.numel())
    if gate.block is None:
        return places
    firsts_K = find_firsts(gate.block).cpu()
    return places.view(gate.score.shape).index_select(gate.channel, firsts_K).flatten()


def set_score(gate: Gate, score: Tensor) -> None:
    """Set a gate's score, in the memory format that it has: a resumed run must not differ."""
    gate.score.data.copy_(score)


@torch.no_grad()
def count_open_gates(model: nn.Module) -> list[int]:
    """Count the open gates of each layer, in one read of the device."""
    counts = [(gate.score > 0).sum() for _, _, gate in iterate_gates(model)]
    return torch.stack(counts).tolist() if counts else []


def count_open(model: nn.Module) -> float:
    """Sum the price of all weights that open gates keep."""
    layers = zip(iterate_gates(model), count_open_gates(model), strict=True)
    return sum(compute_worth(layer, gate) * count for (_, layer, gate), count in layers)


def count_gated(model: nn.Module) -> float:
    """Sum the price of all gated weights."""
    return sum(gate.price * get_weight(layer).numel() for _, layer, gate in iterate_gates(model))
