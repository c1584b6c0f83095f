"""Open and close gates by the rank of their scores."""

import torch
from torch import nn

from elastic.pruning.gates import (
    average_score,
    compute_worth,
    count_open_gates,
    iterate_gates,
    list_firsts,
    set_score,
)

REOPENED = 0.3  # the score of a gate that is opened again
MARGIN = 1e-3  # gates opened or closed by rank are at least so far from the threshold


@torch.no_grad()
def keep_best_gates(model: nn.Module, count: float) -> None:
    """Open the gates of highest score as far as `count` allows, and close the others.

    A gate takes the price of the weights behind it off `count`, 1 a weight unless the penalty is on MACs.
    Blocks are ranked by their means, as a whole. Of every layer the best gate stays, whatever `count` is.
    """
    layers = [(gate, compute_worth(layer, gate)) for _, layer, gate in iterate_gates(model)]
    scores_by_gate = [average_score(gate) for gate, _ in layers]
    sizes = [score.numel() for score in scores_by_gate]
    scores = torch.cat([score.flatten() for score in scores_by_gate]).cpu()
    prices = torch.cat([torch.full((size,), worth) for size, (_, worth) in zip(sizes, layers, strict=True)])
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    firsts = torch.cat([start + list_firsts(gate) for start, (gate, _) in zip(starts, layers, strict=True)])
    prices = torch.zeros_like(prices).index_add_(0, firsts, prices)  # the first of a block pays for all
    best = firsts[starts + torch.stack([part.argmax() for part in scores.split(sizes)])]
    # The best of each layer come first, so that the others share what is left of `count`. The order is
    # stable: gates that nothing has moved yet have equal scores.
    ranking = scores.index_fill(0, best, torch.inf).sort(descending=True, stable=True).indices
    is_open = torch.zeros(len(scores), dtype=torch.bool)
    is_open[ranking] = prices[ranking].cumsum(0) <= count
    is_open[best] = True
    parts = is_open[firsts].split(sizes)
    for (gate, _), score, part in zip(layers, scores_by_gate, parts, strict=True):
        mask = part.view(score.shape).to(score.device)
        set_score(gate, score.clamp(min=MARGIN).where(mask, score.clamp(max=-MARGIN)))


@torch.no_grad()
def reopen_gates(model: nn.Module, least: float) -> None:
    """Open shut gates, of highest score first, until about `least` weights (Σ price) stay, and one a layer.

    Penalties shut gates that are alike in the same few steps. A layer whose gates are all shut passes nothing
    on, and no gradient comes that could open one again.
    """
    if least == 0 and all(count_open_gates(model)):
        return
    scores = {gate: gate.score.clone() for _, _, gate in iterate_gates(model)}
    keep_best_gates(model, least)
    for gate, score in scores.items():
        is_reopened = (score <= 0) & (gate.score > 0)
        set_score(gate, score.masked_fill_(is_reopened, REOPENED))
