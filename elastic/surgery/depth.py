"""Grow in depth: a further residual block at the end of a stage enters as an identity.

A stage is an `nn.Sequential` or `nn.ModuleList` whose last child is a residual block y = act(f(x) + x), f
ending in a norm, a scale or a layer (`elastic.surgery.residual`). A copy of that block with fresh weights,
and with what ends f at zero, is the identity: f is zero, and act (ReLU or nothing) leaves what the same act
has given (He et al. zero a norm's gain likewise, arXiv 1812.01187, section 3.1). So growth in depth preserves
the function, as growth in width does.
"""

import copy
import re
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.surgery.fresh import draw_he_normal
from elastic.surgery.layers import list_tensors
from elastic.surgery.outputs import list_output_tensors
from elastic.surgery.reindexing import reindex_copy, resize_index
from elastic.surgery.residual import find_last_tensors, get_last_child, is_sequence
from elastic.widths.copying import copy_module
from elastic.widths.discovery import find_widths
from elastic.widths.inputs import draw_inputs
from elastic.widths.matching import require_widths
from elastic.widths.mode import preserve_modes, set_mode
from elastic.widths.parameters import find_weight_norm, get_original
from elastic.widths.tracing import BATCH_NORM
from elastic.widths.width import Widths, fix_widths

REMEDY = "set its Growth's blocks to 0 (callbacks.growth.amount.blocks=0)"


def find_stages(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Find the stages that can grow, by path; with each the parameters that end f, by their paths in a block.

    Stages inside the blocks of a stage are left out.
    """
    stages: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        is_inner = any(path.startswith(_prefix(outer)) for outer, tensors in stages.items() if tensors)
        if not is_inner and is_sequence(module) and name_next(module) is not None:
            stages[path] = find_last_tensors(get_last_child(module))
    return {path: tensors for path, tensors in stages.items() if tensors}


def name_next(sequence: nn.Module) -> str | None:
    """Name the module that would follow the last of a sequence; None where that has no number."""
    names = list(sequence._modules)
    numbered = re.fullmatch(r"(.*?)(\d+)", names[-1])
    name = f"{numbered[1]}{int(numbered[2]) + 1}" if numbered else None
    return None if name in names else name


def get_blocks(model: nn.Module, stage: str) -> dict[str, nn.Module]:
    """Get the blocks of a stage (and what stands before them in it), by their names."""
    return cast(dict[str, nn.Module], model.get_submodule(stage)._modules)


def count_blocks(model: nn.Module) -> dict[str, int]:
    """Count the blocks of each stage that can grow."""
    return {path: len(get_blocks(model, path)) for path in find_stages(model)}


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
    require_widths(model, widths)
    stages = find_stages(model)
    if stage not in stages:
        others = f"the model has {', '.join(stages)}" if stages else "the model has none"
        raise StructureError(f"'{stage}' is no sequence of residual blocks that could grow: {others}")
    deeper = _find_deeper_widths(model, widths, stage)
    outputs, count = _compute_outputs(model, widths), len(get_blocks(model, stage))
    generator = generator or torch.Generator().manual_seed(0)
    block = _make_identity(get_last_child(model.get_submodule(stage)), stages[stage], generator)
    _append(model, stage, block)
    if not all(map(torch.allclose, outputs, _compute_outputs(model, widths))):
        keep_blocks(model, stage, count)
        raise StructureError(
            f"'{stage}' cannot grow: the model is another function with a block more; {REMEDY}"
        )
    widths.widths, widths.fixed = deeper.widths, deeper.fixed
    for replica in copies:
        _append(replica, stage, copy.deepcopy(block))


def list_growing_stages(model: nn.Module, widths: Widths) -> list[str]:
    """List the stages that a block more would follow, found by trial: nothing changes.

    Raises:
        StructureError: there is none.
    """
    growing, refusals = [], []
    for stage in find_stages(model):
        try:
            deepen(copy_module(model), copy.deepcopy(widths), stage)
            growing.append(stage)
        except StructureError as error:
            refusals.append(str(error))
    if not growing:
        raise StructureError(
            refusals[0] if refusals else f"the model has no stage that could gain a block; {REMEDY}"
        )
    return growing


def keep_blocks(model: nn.Module, stage: str, count: int) -> None:
    """Keep the first blocks of a stage alone."""
    blocks = get_blocks(model, stage)
    for name in list(blocks)[count:]:
        del blocks[name]


def get_template_name(model: nn.Module, stage: str, name: str) -> str:
    """Name what a layer or width in a stage's last block was modelled on, in the block before."""
    template, block = (f"{_prefix(stage)}{child}." for child in list(get_blocks(model, stage))[-2:])
    return f"{template}{name.removeprefix(block)}"


def find_templates(model: nn.Module, stage: str) -> dict[nn.Parameter, nn.Parameter]:
    """Find, for each parameter of a stage's last block, that of the block before which it was modelled on."""
    parameters, block = dict(model.named_parameters()), _prefix_last(model, stage)
    names = [name for name in parameters if name.startswith(block)]
    return {parameters[name]: parameters[get_template_name(model, stage, name)] for name in names}


def _prefix(stage: str) -> str:
    return f"{stage}." if stage else ""


def _prefix_last(model: nn.Module, stage: str) -> str:
    """Give what the names in a stage's last block begin with."""
    return f"{_prefix(stage)}{list(get_blocks(model, stage))[-1]}."


def _append(model: nn.Module, stage: str, block: nn.Module) -> None:
    sequence = model.get_submodule(stage)
    sequence.add_module(cast(str, name_next(sequence)), block)


def _find_deeper_widths(model: nn.Module, widths: Widths, stage: str) -> Widths:
    """Find the widths that the model would have with a block more."""
    replica, sizes = _copy_deeper(model, widths, stage)
    deeper, block = find_widths(replica, *widths.example), _prefix_last(replica, stage)
    fix_widths(deeper, {name: reason for name, reason in widths.fixed.items() if name in deeper})
    is_used = any(slot.module.startswith(block) for width in deeper.values() for slot in width.slots)
    old = {name: size for name, size in deeper.sizes().items() if not name.startswith(block)}
    templates = {name: get_template_name(replica, stage, name) for name in deeper if name not in old}
    if not is_used or old != sizes or not set(templates.values()) <= set(old):
        raise StructureError(f"'{stage}' cannot grow: its blocks are not used one after the other; {REMEDY}")
    for name, width in deeper.items():
        width.size = widths[templates.get(name, name)].size
    deeper.example = widths.example
    return deeper


def _copy_deeper(model: nn.Module, widths: Widths, stage: str) -> tuple[nn.Module, dict[str, int]]:
    """Copy the model with the stage's last block twice; give the sizes of the copy's widths, too.

    Each has two channels at least: one may look like none.
    """
    single = {name: resize_index(1, 2) for name, width in widths.items() if width.size == 1}
    replica, replica_widths = reindex_copy(model, widths, single)
    _append(replica, stage, copy.deepcopy(get_last_child(replica.get_submodule(stage))))
    return replica, replica_widths.sizes()


@torch.no_grad()
def _compute_outputs(model: nn.Module, widths: Widths) -> list[Tensor]:
    """Compute what the model makes of noise, in evaluation mode."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    with preserve_modes(model):
        noise = (x.to(device) for x in draw_inputs(model, widths.example, generator))
        return list_output_tensors(set_mode(model).forward(*noise))


@torch.no_grad()
def _make_identity(block: nn.Module, last: Iterable[str], generator: torch.Generator) -> nn.Module:
    """Copy a block with fresh weights and gates, the parameters that end it at zero."""
    identity = copy.deepcopy(block)
    for path, module in identity.named_modules():
        if "parametrizations" not in path.split("."):  # a gate's own, which its layer stands for
            _start_anew(module, generator)
    for path, _, tensor in (name.rpartition(".") for name in last):
        layer = identity.get_submodule(path)
        norm = find_weight_norm(layer, tensor)  # of whose direction zeros would be no direction
        value = norm.norms if norm is not None else get_original(layer, tensor)
        assert value is not None
        value.zero_()
    return identity


def _start_anew(module: nn.Module, generator: torch.Generator) -> None:
    """Give a layer's tensors the values that fresh channels start with."""
    if isinstance(module, BATCH_NORM):
        module.reset_running_stats()
    for tensor in ("weight", "bias"):
        for item in list_tensors(module, tensor):
            if item.has_fresh_strategy:
                item.value.copy_(draw_he_normal(item.value, generator))
            elif item.norm is not None:
                item.value.copy_(item.norm.compute_norms(item.norm.direction))
            elif item.fill is not None:
                item.value.fill_(item.fill)
