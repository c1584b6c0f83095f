"""Growth in depth: a further residual block at the end of a stage, which enters as an identity.

A stage is an `nn.Sequential` whose last child is a residual block y = act(f(x) + x), f ending in a norm. A
copy of that block with fresh weights, and with that norm's gain and shift at zero, is the identity: f is
zero, and act (ReLU or nothing) leaves what the same act has given (He et al. zero the gain likewise, arXiv
1812.01187, section 3.1). So growth in depth preserves the function, as growth in width does.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from elastic.errors import StructureError
from elastic.surgery.fresh import draw_he_normal
from elastic.surgery.layers import NORMS, list_tensors
from elastic.surgery.reindexing import reindex, resize_index
from elastic.widths.discovery import Widths, find_widths
from elastic.widths.parameters import ChannelParametrization, get_original
from elastic.widths.tracing import get_layer, get_operation_name, make_meta_copy, preserve_modes, trace

ADDS = {"add", "iadd"}
LEAVE = "set growth.blocks=0"
# Functions that leave what they have given as it is.
IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Identity)
IDEMPOTENT_CALLS = {"relu", "relu6", "output"}


def find_stages(model: nn.Module) -> dict[str, str]:
    """The stages that can grow, by path; with each the norm, by its path in a block, that ends f.

    Stages inside the blocks of a stage are left out.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(_head(outer)) for outer in found)
        numbered = list(module._modules) == [str(i) for i in range(len(module._modules))]
        if type(module) is nn.Sequential and len(module) and numbered and not inside:
            norm = _last_norm(module[-1])
            if norm is not None:
                found[path] = norm
    return found


def count_blocks(model: nn.Module) -> dict[str, int]:
    """The blocks of each stage that can grow."""
    return {path: len(model.get_submodule(path)) for path in find_stages(model)}  # type: ignore[arg-type]


def deepen(
    model: nn.Module,
    widths: Widths,
    stage: str,
    *,
    copies: Iterable[nn.Module] = (),
    generator: torch.Generator | None = None,
) -> None:
    """Append a block to a stage, in place; `widths` is brought up to date.

    The block has the shapes of the stage's last one. Its weights are drawn from `generator`; it is the same
    in all `copies`. An optimizer has to be told of its parameters.

    Raises:
        StructureError: the stage is no sequence of residual blocks, the model does not use it as one, or the
            model cannot be followed with a further block. Nothing has changed then.
    """
    known = find_stages(model)
    if stage not in known:
        there = f"the model has {', '.join(known)}" if known else "the model has none"
        raise StructureError(f"'{stage}' is no sequence of residual blocks that could grow: {there}")
    now = _with_a_block(model, widths, stage)
    grown: Any = model.get_submodule(stage)
    before = _outputs(model, widths)
    grown.append(_identity(grown[-1], known[stage], generator or torch.Generator().manual_seed(0)))
    if not all(map(torch.allclose, before, _outputs(model, widths))):
        del grown[-1]
        raise StructureError(
            f"'{stage}' cannot grow: the model is another function with a block more; {LEAVE}"
        )
    widths.widths, widths.fixed = now.widths, now.fixed
    for twin in copies:
        its: Any = twin.get_submodule(stage)
        its.append(copy.deepcopy(grown[-1]))


def get_template_name(stage: str, count: int, name: str) -> str:
    """The layer or width in a stage's block before that one of block `count` was modelled on."""
    return f"{_head(stage)}{count - 1}.{name.removeprefix(f'{_head(stage)}{count}.')}"


def _head(stage: str) -> str:
    return f"{stage}." if stage else ""


def _with_a_block(model: nn.Module, widths: Widths, stage: str) -> Widths:
    """The widths that the model would have; found at two channels at least: one may look like none."""
    twin, its = copy.deepcopy(model), copy.deepcopy(widths)
    reindex(twin, its, {name: resize_index(1, 2) for name, width in widths.items() if width.size == 1})
    blocks: Any = twin.get_submodule(stage)
    count = len(blocks)
    blocks.append(copy.deepcopy(blocks[-1]))
    now, new = find_widths(twin, *widths.example), f"{_head(stage)}{count}."
    used = any(slot.module.startswith(new) for width in now.values() for slot in width.slots)
    old = {name: width.size for name, width in now.items() if not name.startswith(new)}
    models = {name: get_template_name(stage, count, name) for name in now if name.startswith(new)}
    if not used or old != its.sizes() or not set(models.values()) <= set(old):
        raise StructureError(f"'{stage}' cannot grow: its blocks are not used one after the other; {LEAVE}")
    for name, width in now.items():
        width.size = widths[models.get(name, name)].size
    now.example = widths.example
    return now


@torch.no_grad()
def _outputs(model: nn.Module, widths: Widths) -> list[Tensor]:
    """What the model makes of noise, in evaluation mode."""
    held = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    with preserve_modes(model):
        noise = (torch.randn(x.shape, generator=generator).to(held.device, x.dtype) for x in widths.example)
        out = model.eval().forward(*noise)
    return [out] if isinstance(out, Tensor) else [held for held in out if isinstance(held, Tensor)]


@torch.no_grad()
def _identity(block: nn.Module, norm: str, generator: torch.Generator) -> nn.Module:
    """A copy with fresh weights and gates, the gain and shift of its last norm at zero."""
    new = copy.deepcopy(block)
    for path, module in new.named_modules():
        if "parametrizations" in path.split("."):
            continue  # a gate's own, which its layer stands for
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
        for tensor in ("weight", "bias"):
            for item in list_tensors(module, tensor):
                if item.has_fresh_strategy:
                    item.value.copy_(draw_he_normal(item.value, generator))
                elif item.fill is not None:
                    item.value.fill_(item.fill)
    for tensor in ("weight", "bias"):
        held = get_original(new.get_submodule(norm), tensor)
        assert held is not None
        held.zero_()
    return new


def _last_norm(block: nn.Module) -> str | None:
    """The path of the norm that ends f in a block y = act(f(x) + x); None where the block is no such one."""
    lists = (m for m in block.modules() if isinstance(m, parametrize.ParametrizationList))
    if any(
        not isinstance(parametrization, ChannelParametrization)
        for chain in lists
        for parametrization in chain
    ):
        return None
    try:
        graph = trace(make_meta_copy(block)).graph
    except StructureError:
        return None
    inputs = graph.find_nodes(op="placeholder")
    adds = [
        node
        for node in graph.nodes
        if get_operation_name(node).strip("_") in ADDS and node.op != "call_module"
    ]
    if len(inputs) != 1 or not adds:
        return None
    branches = [_source(node, block) for node in adds[-1].all_input_nodes]
    norms = [node for node in branches if node is not inputs[0] and _affine_norm(node, block)]
    if len(branches) != 2 or len(norms) != 1 or inputs[0] not in branches:
        return None
    return str(norms[0].target) if _idempotent(adds[-1], block) else None


def _source(node: fx.Node, block: nn.Module) -> fx.Node:
    """Where a value comes from, past modules that do nothing."""
    while node.op == "call_module" and isinstance(block.get_submodule(str(node.target)), nn.Identity):
        node = node.all_input_nodes[0]
    return node


def _affine_norm(node: fx.Node, block: nn.Module) -> bool:
    if node.op != "call_module":
        return False
    module = block.get_submodule(str(node.target))
    return isinstance(module, NORMS) and None not in (
        get_original(module, "weight"),
        get_original(module, "bias"),
    )


def _idempotent(node: fx.Node, block: nn.Module) -> bool:
    """Whether all that follows the node leaves alone what it has given."""
    for user in node.users:
        layer = get_layer(block, user)
        known = (
            isinstance(layer, IDEMPOTENT)
            if layer
            else get_operation_name(user).strip("_") in IDEMPOTENT_CALLS
        )
        if not known or not _idempotent(user, block):
            return False
    return True
