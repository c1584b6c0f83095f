"""Re-index what an optimizer keeps of a parameter, whatever it is called and however it is laid out."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from elastic.errors import StructureError
from elastic.surgery.gathering import Move, gather, gather_from_model
from elastic.surgery.layers import LayerTensor
from elastic.widths.leaves import list_tensors

# What steps are scaled by: a zero there makes a fresh channel's first step many times the learning rate (a
# second moment), or none (Rprop's step size), so fresh entries take the mean along the axis.
SCALES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "step_size"} | {
    "row_var",
    "col_var",
    "variance",
}
ENTRY_RATE = "entry_rate"  # of `elastic.training.entry_rates`, which finds fresh entries by their zeros
# Moments of gradients, too: a fresh entry has had none.
ZEROED = {"exp_avg", "momentum_buffer", "grad_avg", "prev", ENTRY_RATE}
AVERAGED_DIM = {"row": -1, "col": -2}  # of Adafactor's and its like, which hold an entry a row or column


def gather_state(
    optimizer: torch.optim.Optimizer, item: LayerTensor, moves: Sequence[Move], renewed: Tensor
) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Re-index what an optimizer keeps of a parameter: yield the state, a key, and the value for it.

    Args:
        renewed: the parameter's value, re-indexed already.

    Raises:
        StructureError: see `check_state`.
    """
    check_state(optimizer, item.value)
    state = optimizer.state.get(item.value, {})
    for key, value in state.items():
        if any(_needs_change(leaf, item.value) for leaf in tree_leaves(value)):
            yield state, key, tree_map_only(Tensor, partial(_renew, key, item, moves, renewed), value)


def check_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Refuse what an optimizer keeps of a parameter that has no entries for the parameter's own.

    Raises:
        StructureError: it keeps such a thing, as Shampoo does matrices.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        for leaf in tree_leaves(value):
            if _needs_change(leaf, parameter) and not _can_follow(key, leaf, parameter):
                is_tensor = isinstance(leaf, Tensor)
                form = f"of shape {tuple(leaf.shape)}" if is_tensor else f"as a {type(leaf).__name__}"
                raise StructureError(
                    f"{type(optimizer).__name__} keeps '{key}' {form} for a tensor of shape "
                    f"{tuple(parameter.shape)}, which cannot follow: use SGD, Adam or AdamW"
                )


def _needs_change(leaf: Any, parameter: Tensor) -> bool:
    """Tell whether something is of the parameter's entries: numbers for all of them together stay."""
    if isinstance(leaf, Tensor):
        return leaf.numel() != 1 or leaf.shape == parameter.shape
    return bool(list_tensors(leaf))


def _can_follow(key: str, leaf: Any, parameter: Tensor) -> bool:
    """Tell whether something has entries for the parameter's, for its rows, or for its columns."""
    return isinstance(leaf, Tensor) and _align(key, leaf, parameter) is not None


def _renew(key: str, item: LayerTensor, moves: Sequence[Move], renewed: Tensor, tensor: Tensor) -> Tensor:
    """Re-index one tensor; fresh entries are the parameter's own, a mean or zero, by what the tensor is."""
    aligned = _align(key, tensor, item.value)
    if aligned is None or not _needs_change(tensor, item.value):
        return tensor
    value, dims = aligned
    is_whole = value.shape == item.value.shape
    if key not in SCALES | ZEROED and is_whole and _stands_for(value, item.value):
        new = gather_from_model(LayerTensor(value, item.dims, None), moves, renewed)
    else:
        is_scale = key in SCALES or (key not in ZEROED and _is_scale(value))
        new = gather(LayerTensor(value, item.dims & dims, None if is_scale else 0.0), moves)
    if tensor.dim() == value.dim():
        return new
    averaged = _get_averaged(key)
    return new.flatten() if is_whole or averaged is None else new.squeeze(averaged)


def _align(key: str, tensor: Tensor, parameter: Tensor) -> tuple[Tensor, frozenset[int]] | None:
    """View a tensor with a parameter's dimensions, and say on which of them it has entries of its own."""
    shape, averaged = parameter.shape, _get_averaged(key)
    if tensor.dim() == 1 and tensor.numel() == parameter.numel():
        return tensor.view(shape), frozenset(range(len(shape)))
    if averaged is not None and tensor.dim() == len(shape) - 1:
        tensor = tensor.unsqueeze(averaged)
    if tensor.dim() != len(shape) or any(n not in (1, m) for n, m in zip(tensor.shape, shape, strict=True)):
        return None
    lacking = {d for d, (n, m) in enumerate(zip(tensor.shape, shape, strict=True)) if n != m}
    if averaged is not None and tensor.shape[averaged] == 1:
        lacking.add(averaged % len(shape))
    return tensor, frozenset(range(len(shape))) - lacking


def _get_averaged(key: str) -> int | None:
    """Get the dimension that the name of a state says to be averaged over."""
    return next((dim for name, dim in AVERAGED_DIM.items() if name in key.split("_")), None)


def _stands_for(value: Tensor, parameter: Tensor) -> bool:
    """Tell whether an optimizer keeps a parameter as it was, or its average: nearer to it than to zero."""
    return value.is_floating_point() and bool((value - parameter.to(value)).norm() < value.norm())


def _is_scale(value: Tensor) -> bool:
    """Tell whether steps are scaled by what an optimizer keeps: it is never negative."""
    return value.is_floating_point() and bool((value >= 0).all())
