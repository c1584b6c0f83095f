"""Take a level out of the network that it is a part of, to run on its own as fast as it can."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from elastic.dynamic.skipping import make_skipping
from elastic.dynamic.skipping.replay import MAX_SAMPLES
from elastic.levels.cutting import extract_level
from elastic.levels.deadline import check_deadline
from elastic.widths.inputs import Example, count_batch, draw_inputs, select_samples, split_batch
from elastic.widths.mode import set_mode

CLOSE = 1e-3  # how far outputs of a batch may be from those of its inputs alone


def make_alone(level: nn.Module, *samples: Example) -> nn.Module:
    """Make a level a network of its own, in evaluation mode, executed in the fastest way there is here.

    On a CPU, in fp32, that is the compiled kernel or stock torch with norms folded, layer by layer, as
    measured on the samples; elsewhere `extract_level`. Alone, levels need the memory of all; in place, that
    of the largest. What `Runtime` sees to be late it can stop after any eight inputs of a batch, unless the
    inputs of a batch have a say in each other's outputs.

    Args:
        samples: inputs as they will come; of a network of several inputs, each a sequence of them.
    """
    alone = set_mode(extract_level(level))
    tensors = [tensor for tensor in (*alone.parameters(), *alone.buffers()) if tensor.is_floating_point()]
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in tensors):
        return alone
    fast = make_skipping(alone, [select_samples(sample, slice(MAX_SAMPLES)) for sample in samples])
    return InParts(fast) if samples and _answers_one_by_one(alone, samples[0]) else fast


@torch.no_grad()
def _answers_one_by_one(net: nn.Module, sample: Example) -> bool:
    """Tell whether a network's outputs for a batch are those for its inputs, one behind the other."""
    pair = draw_inputs(net, sample, torch.Generator().manual_seed(0), 2)
    try:
        joined, *parts = (tree_leaves(net(*inputs)) for inputs in [pair, *split_batch(pair, 1)])
        return all(map(_is_joined, joined, *parts))
    except Exception:  # the network's own code: it may not run on noise, or on a single input
        return False


def _is_joined(joined: Any, first: Any, second: Any) -> bool:
    if not isinstance(joined, Tensor) or not joined.dim() or len(joined) != 2:
        return False
    return torch.allclose(joined, torch.cat([first, second]), CLOSE, CLOSE, equal_nan=True)


class InParts(nn.Module):
    """Compute a batch part by part, and see in between whether it will be in time."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Any:
        parts, batch = split_batch(inputs, MAX_SAMPLES), count_batch(inputs)
        if len(parts) <= 1:
            return self.net(*inputs)
        outputs, count = [], 0
        for part in parts:
            outputs.append(self.net(*part))
            count += count_batch(part)
            check_deadline(count / batch)
        return tree_map(lambda *tensors: torch.cat(tensors), *outputs)
