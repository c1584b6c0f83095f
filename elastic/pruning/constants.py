"""Find the constants that channels hold where layers read them, and decide who takes them over.

What nothing writes may still hold a constant (a norm's shift, a bias). The network itself is asked for it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from elastic.widths.copying import copy_module
from elastic.widths.hooks import quiet_hooks
from elastic.widths.inputs import Example, draw_inputs
from elastic.widths.mode import set_mode
from elastic.widths.parameters import get_weight
from elastic.widths.width import Slot, Width, Widths

# Layers whose input is what their weight multiplies are known by their forward: that of a subclass may do
# anything to it first (pad it, normalise it), so that nothing is known there.
CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
TRANSPOSED = (nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward)
READERS = (nn.Linear.forward, *CONVOLUTIONS, *TRANSPOSED)
FUNCTIONS = (
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.linear,
)
# Noise of many scales, so that what saturates on one of them varies on another: thirds of each sample, side
# by side. Few samples, since most of the time that compaction takes is theirs.
SCALES = ((0, 0.1, 1), (0.3, 3, 10), (1, 30, 100))
SPREAD = 1e-6  # relative; a map that varies by no more is a constant


class Reading(NamedTuple):
    """Hold the constants that one reader finds on a width's channels: (channels, copies), NaN for none."""

    slot: Slot
    values: Tensor


class Move(NamedTuple):
    """Say where the constants of unwritten channels go: into biases, or onto one channel for all."""

    into_bias: Tensor  # channels, by number
    into_carrier: Tensor
    carrier: int = 0


# --- observing --------------------------------------------------------------------------------------------


def observe_constants(model: nn.Module, layers: Iterable[str], example: Example) -> dict[str, Tensor]:
    """Find, for each layer, the constant that each of its input channels holds, or NaN where it varies.

    The model runs, in the mode it is in, on noise of the example's shape. Of layers whose forward is not that
    of a stock convolution or linear layer, zeros alone are known, and that where functions are given both
    these channels and what is computed of the layer's weight.
    """
    noise = draw_inputs(model, example, torch.Generator().manual_seed(0), samples=len(SCALES))
    for x in noise:
        if x.is_floating_point() and x.dim() > 1 and len(x) == len(SCALES):
            _scale_thirds(x)
    device = next(model.parameters()).device
    readers = {path: model.get_submodule(path) for path in layers}
    own = {path: layer for path, layer in readers.items() if not has_forward_of(layer, READERS)}
    constants: dict[str, Tensor] = {}
    watch = _FunctionWatch(own, constants) if own else nullcontext()
    # What a weight is computed of is known by its gradient.
    with quiet_hooks(model), torch.set_grad_enabled(bool(own)), _watch(readers, constants), watch:
        model(*(x.to(device) for x in noise))
    return {path: values.cpu() for path, values in constants.items()}


def observe_in_training(model: nn.Module, layers: Iterable[str], example: Example) -> dict[str, Tensor]:
    """Find the constants of `observe_constants` by the statistics of a batch, on a copy of the model."""
    with torch.random.fork_rng(devices=[]):  # dropout draws
        return observe_constants(set_mode(copy_module(model), True), layers, example)


def observe_zeros_in_training(model: nn.Module, layers: Iterable[str], example: Example) -> dict[str, Tensor]:
    """Find, for each layer that is called in training, which input channels are zero there: NaN for others.

    Nothing is known where the model does not run in training on inputs alone.
    """
    with suppress(Exception):  # the model's own forward runs
        constants = observe_in_training(model, layers, example)
        return {path: values.where(values == 0, torch.nan) for path, values in constants.items()}
    return {}


def _scale_thirds(noise: Tensor) -> None:
    for sample, scales in zip(noise, SCALES, strict=True):
        for third, scale in zip(sample.chunk(3, -1), scales, strict=False):  # an input may have one entry
            third *= scale


@contextmanager
def _watch(layers: Mapping[str, nn.Module], constants: dict[str, Tensor]) -> Iterator[None]:
    """Record the constants of each stock layer's input channels while the model runs."""

    def look(path: str, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        _record(constants, path, _find_constants(layer, args[0] if args else kwargs["input"]))

    hooks = []
    for path, layer in layers.items():
        if has_forward_of(layer, READERS):
            hooks.append(layer.register_forward_pre_hook(partial(look, path), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _FunctionWatch(TorchFunctionMode):
    """Record which input channels of functions are zero, for the layers whose weights they are given."""

    def __init__(self, layers: Mapping[str, nn.Module], constants: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers, self.constants = layers, constants
        self.paths = {id(get_weight(layer)): path for path, layer in layers.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
        if func in FUNCTIONS:
            for path in self._find_sources(given["weight"]):
                values = _find_constants(self.layers[path], given["input"])
                _record(self.constants, path, values.where(values == 0, torch.nan))
        return func(*args, **(kwargs or {}))

    def _find_sources(self, weight: Tensor) -> set[str]:
        """Find the layers whose weights a tensor is, or is computed of."""
        visited, pending = set[Any](), [weight.grad_fn]
        stored: list[Tensor] = [weight]
        while pending:
            function = pending.pop()
            if function is not None and function not in visited:
                visited.add(function)
                pending += [source for source, _ in function.next_functions]
                stored += [function.variable] if hasattr(function, "variable") else []
        return {self.paths[id(tensor)] for tensor in stored if id(tensor) in self.paths}


def _record(constants: dict[str, Tensor], path: str, values: Tensor) -> None:
    """Note constants of a layer's input channels; what it has found in another call has to be the same."""
    known = constants.get(path, values)
    constants[path] = values.where(values == known, torch.nan)


def _find_constants(layer: nn.Module, x: Tensor) -> Tensor:
    """Give the value of each channel that is the same everywhere in all samples, NaN for the others."""
    channel = x.dim() - get_weight(layer).dim() + 1
    others = [dim for dim in range(x.dim()) if dim != channel]
    lower, upper = x.detach().amin(others), x.detach().amax(others)
    return torch.where(upper - lower <= SPREAD * (1 + upper.abs()), (lower + upper) / 2, torch.nan)


def has_forward_of(layer: nn.Module, forwards: Iterable[Callable[..., Tensor]]) -> bool:
    """Tell whether a layer's forward is one of these, whatever its class."""
    return type(layer).forward in forwards and "forward" not in vars(layer)


def read_constants(widths: Widths, width: Width, constants: Mapping[str, Tensor]) -> list[Reading]:
    """Look up, for each reader of a width, what `observe_constants` has seen on the width's channels."""
    return [
        Reading(slot, _list_columns(widths, slot, constants)[widths.positions(slot, width.name)])
        for slot in width.slots_with("in")
    ]


def _list_columns(widths: Widths, slot: Slot, constants: Mapping[str, Tensor]) -> Tensor:
    """List the constant that each column of a reader's weight meets, NaN where that is not known."""
    columns = sum(widths.extents(slot))
    if slot.module not in constants:
        return torch.full((columns,), torch.nan)
    groups = constants[slot.module].view(-1, columns)
    if len(groups) == 1:
        return groups[0]
    # One column of a grouped convolution reads a channel of every group.
    return torch.where((groups == 0).all(0), 0.0, torch.nan)


# --- moving -----------------------------------------------------------------------------------------------


def plan_move(model: nn.Module, unwritten: Tensor, readings: list[Reading]) -> Move:
    """Decide where the constants of unwritten channels go; a channel that varies for some reader stays.

    What no padding reader tells from zero goes into biases. The others go onto one of them: that whose
    constant is the largest where it is smallest, so that ratios to it are well defined.
    """
    is_constant, affects_padding = unwritten.clone(), torch.zeros_like(unwritten)
    for _, values in readings:
        is_constant &= ~values.isnan().any(1)
    padding = [values for slot, values in readings if not keeps_constants(model.get_submodule(slot.module))]
    for values in padding:
        affects_padding |= (values != 0).any(1)
    into_bias, others = ((is_constant & m).nonzero().flatten() for m in (~affects_padding, affects_padding))
    # A reader that finds zeros on all of them does not mind which one carries.
    magnitudes = [values[others].abs().amin(1) for values in padding if values[others].any()]
    if not magnitudes:
        return Move(into_bias, others[:0])
    magnitude = torch.stack(magnitudes).amin(0)
    best = int(magnitude.argmax())
    if magnitude[best] == 0:
        return Move(into_bias, others[:0])
    return Move(into_bias, others[others != others[best]], int(others[best]))


def keeps_constants(layer: nn.Module) -> bool:
    """Tell whether a layer makes constant maps of constant maps; zeros beyond their border end that."""
    if has_forward_of(layer, CONVOLUTIONS):
        convolution = cast(nn.Conv2d, layer)  # or one of another number of dimensions
        if convolution.padding_mode != "zeros" or convolution.padding == "valid":
            return True
        if convolution.padding == "same":
            return all(size == 1 for size in convolution.kernel_size)
        return not any(convolution.padding)
    return has_forward_of(layer, (nn.Linear.forward,))
