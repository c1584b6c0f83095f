"""Take a level out of the network that it is a part of, to run on its own as fast as it can."""

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.skipping import make_skipping
from elastic.levels.cutting import extract_level
from elastic.levels.progress import mark_progress


def make_alone(level: nn.Module, *samples: Tensor) -> nn.Module:
    """Make a level a network of its own, in evaluation mode, executed in the fastest way there is here.

    On a CPU, in fp32, that is the compiled kernel or stock torch with norms folded, layer by layer, as
    measured on the samples; elsewhere `extract_level`. Alone, levels need the memory of all; in place, that
    of the largest.

    Args:
        samples: inputs as they will come.
    """
    alone = extract_level(level).eval()
    tensors = [tensor for tensor in (*alone.parameters(), *alone.buffers()) if tensor.is_floating_point()]
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in tensors):
        return alone
    fastest = make_skipping(alone, samples)
    if samples and isinstance(fastest, fx.GraphModule):
        mark_progress(fastest, samples[0])
    return fastest
