"""Answer by a small network where it is sure, and by a larger one where it is not.

Cascades: Wang et al., arXiv 2012.01988; as exits of one network, Teerapittayanon et al., arXiv 1709.01686.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from elastic.errors import OptionError, StructureError
from elastic.widths.inputs import Example, list_inputs, select_samples

Answer = Callable[..., Tensor]  # inputs -> logits_BK


def run_cascade(nets: Sequence[Answer], x: Example, threshold: float) -> tuple[Tensor, Tensor]:
    """Answer each input by the first network that is sure of its class, and by the last if none is.

    Args:
        nets: the cheapest first, ready for inference: levels, or any others for the same classes.
        x: an input, batch first, or several.
        threshold: the probability of the likeliest class from which an answer is final, 0 … 1.

    Returns:
        logits_BK, and index_B: which network has answered.

    Raises:
        OptionError: there is no network, or a threshold that is no probability.
        StructureError: a network answers with anything but scores of classes.
    """
    if not nets or not 0 <= threshold <= 1:
        raise OptionError(
            f"{len(nets)} networks, sure from a probability of {threshold:g}: give one or more, and 0 to 1"
        )
    logits_BK = check_scores(nets[0](*list_inputs(x))).clone()
    index_B = torch.zeros(len(logits_BK), dtype=torch.long, device=logits_BK.device)
    open_N = torch.arange(len(logits_BK), device=logits_BK.device)
    for k, net in enumerate(nets[1:], 1):
        open_N = open_N[measure_confidence(logits_BK[open_N]) < threshold]
        if not len(open_N):
            break
        logits_BK[open_N] = check_scores(net(*select_samples(x, open_N)))
        index_B[open_N] = k
    return logits_BK, index_B


def check_scores(outputs: Any) -> Tensor:
    """Return what a network answers, where it is one score a class for each input.

    Raises:
        StructureError: it is something else, of which nobody can tell how sure it is.
    """
    if isinstance(outputs, Tensor) and outputs.dim() == 2:
        return outputs
    is_tensor = isinstance(outputs, Tensor)
    kind = f"a tensor of {tuple(outputs.shape)}" if is_tensor else f"a {type(outputs).__name__}"
    raise StructureError(
        f"a network answers with {kind}, of which some inputs cannot be answered again: take networks that "
        "return scores of classes, (inputs, classes)"
    )


def measure_confidence(logits_BK: Tensor) -> Tensor:
    """Return the probability of the likeliest class, of each input."""
    return logits_BK.softmax(1).amax(1)


def count_cascade_macs(index_B: Tensor, macs: Sequence[float]) -> Tensor:
    """Count the MACs that each input took: of the network that has answered, and of all before it."""
    return torch.tensor(list(accumulate(macs)), dtype=torch.double)[index_B.cpu()]


def fit_threshold(logits_LNK: Sequence[Tensor], macs: Sequence[float], budget: float) -> float:
    """Find the highest threshold at which inputs take no more than a budget of MACs, on average.

    Args:
        logits_LNK: what each network says of the same inputs, the cheapest first; labels have no say.
        macs: of each network, for one input.

    Raises:
        OptionError: the budget is less than the cheapest network takes, or not each network has its MACs.
    """
    if not 0 < len(macs) == len(logits_LNK):
        raise OptionError(f"{len(logits_LNK)} networks, MACs of {len(macs)}: give those of each")
    if not budget >= macs[0]:  # nor is NaN
        raise OptionError(f"a budget of {budget:,.0f} MACs: the smallest level alone takes {macs[0]:,.0f}")
    inputs_N = torch.arange(len(logits_LNK[0]))
    nets = [logits_NK.__getitem__ for logits_NK in logits_LNK]

    def measure(threshold: float) -> float:
        index_N = run_cascade(nets, inputs_N, threshold)[1]
        return float(count_cascade_macs(index_N, macs).mean())

    confidences = [measure_confidence(logits_NK) for logits_NK in logits_LNK[:-1]]
    candidates = [0.0, *torch.cat([*confidences, torch.ones(1)]).unique().tolist()]
    return candidates[bisect_right(candidates, budget, key=measure) - 1]
