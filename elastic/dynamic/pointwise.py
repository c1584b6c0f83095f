"""Find the linear layers that are applied to each position of maps, whose channels lie last."""

from functools import partial

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.calls import is_linear
from elastic.widths.hooks import quiet_hooks
from elastic.widths.mode import set_mode
from elastic.widths.tracing import make_meta_copy, run_without_data
from elastic.widths.width import Widths


def list_pointwise(traced: fx.GraphModule, widths: Widths) -> set[str]:
    """List the linear layers that write a width, by what they read: samples of several positions each.

    A classifier's hidden layer is none of them, as a module before it would be as large as itself, nor is one
    that reads windows of images, which are no samples.
    """
    writers = {slot.module for width in widths.values() for slot in width.slots_with("out")}
    called = {str(node.target) for node in traced.graph.find_nodes(op="call_module")}
    linear = {path for path in writers & called if is_linear(traced.get_submodule(path))}
    if not linear:
        return set()
    pointwise, (first, *_) = set[str](), widths.example

    def note(path: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs and inputs[0].dim() > 2 and len(inputs[0]) == len(first):
            pointwise.add(path)

    replica = set_mode(make_meta_copy(traced))
    for path in linear:
        replica.get_submodule(path).register_forward_pre_hook(partial(note, path))
    with torch.no_grad(), quiet_hooks(traced), run_without_data():
        replica(*widths.example)
    return pointwise
