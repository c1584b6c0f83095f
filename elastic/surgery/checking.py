"""Check widths on the real network: what is followed wrongly is found before training, and fixed by name.

A copy of the network, its norms and biases drawn at random so that no channel is like another, must be the
same function after its widths are permuted, and after channels that nothing reads have come or gone.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.errors import StructureError, cite
from elastic.measure.counts import count_macs
from elastic.surgery.fresh import draw_he_normal
from elastic.surgery.indices import grow_index
from elastic.surgery.layers import list_tensors
from elastic.surgery.outputs import list_output_tensors
from elastic.surgery.reindexing import reindex
from elastic.widths.copying import copy_module
from elastic.widths.discovery import discover, refuse_none
from elastic.widths.hooks import quiet_hooks
from elastic.widths.inputs import draw_inputs
from elastic.widths.mode import set_mode
from elastic.widths.operations.interface import is_stored
from elastic.widths.parameters import get_original
from elastic.widths.width import Slot, Widths, fix_widths

TOLERANCE = 1e-6  # of the largest output, in double precision
CHECKED_MACS = 300e6  # of one sample, with those that stand for parameters: under a second on one core
MACS_PER_PARAMETER = 20  # each is copied, and drawn or gathered anew
SAMPLES = 2  # few, since this takes time; not one, which could be taken for one channel
SINGLE_TOLERANCE = 1e-3  # the same, in the model's own, for a model that does not run in another


def discover_checked(model: nn.Module, *example: Tensor) -> Widths:
    """Discover the widths of a model, and check them where that takes under a second.

    Raises:
        StructureError: the model cannot be traced, or none of its channel axes can change.
    """
    widths = discover(model, *example)
    cost = count_macs(model, *example) + MACS_PER_PARAMETER * sum(p.numel() for p in model.parameters())
    if cost <= CHECKED_MACS:
        with suppress(StructureError):  # it may not run on noise
            fix_wrong_widths(model, widths)
    return refuse_none(widths)


def has_widths(model: nn.Module, widths: Widths) -> bool:
    """Tell whether a model has the tensors that widths are of, and in their sizes."""
    slots = {slot for width in widths.values() for slot in width.slots if is_stored(slot.tensor)}
    return all(_find_size(model, slot) == sum(widths.extents(slot)) for slot in slots)


def _find_size(model: nn.Module, slot: Slot) -> int | None:
    """Find how long the dimension of a slot is; None where a model has not its tensor."""
    try:
        value = get_original(model.get_submodule(slot.module), slot.tensor)
    except AttributeError:
        return None
    return None if value is None or value.dim() <= slot.dim else value.shape[slot.dim]


def fix_wrong_widths(model: nn.Module, widths: Widths) -> None:
    """Fix the widths, by name and reason, whose change makes the model another function, in place.

    Raises:
        StructureError: the model does not run on the example.
    """
    probe = _make_probe(model, widths)
    while widths and (reason := probe.find_fault(widths)):
        faults = {name: fault for name in widths if (fault := probe.find_fault([name]))}
        # Where each alone is right, and all of them together are not, none can be trusted.
        fix_widths(widths, faults or dict.fromkeys(widths, f"{reason}, where the other widths change, too"))


def _make_probe(model: nn.Module, widths: Widths) -> "_Probe":
    """Make copies in double precision, unless the model runs in its own only."""
    for dtype in (torch.float64, None):
        try:
            probe = _Probe(model, widths, dtype)
            outputs = probe.run(probe.model)
        except Exception as error:  # the model's own code runs here: anything may come
            fault = cite(error)
            continue
        if not any(y.isfinite().any() for y in outputs):
            raise StructureError("the model's output for noise of the example's shape is nowhere finite")
        if not probe.repeats(outputs):
            probe.drawing = _DrawAlike
            if not probe.repeats(probe.run(probe.model)):
                raise StructureError(
                    "the model changes its weights each time, or draws numbers that are none of torch's: "
                    "what else changes it cannot be told"
                )
        return probe
    raise StructureError(f"the model does not run on noise of the example's shape: {fault}")


class _DrawAlike(TorchDispatchMode):
    """Let each number that is drawn be the same, so that channels which are drawn are alike."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            for tensor in list_output_tensors(drawn):
                tensor.fill_(0.5 if tensor.is_floating_point() else 0)
        return drawn


class _Probe:
    """Try changes on copies of a network.

    Attributes:
        drawing: surrounds each run, and may say what numbers a network draws there.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, widths: Widths, dtype: torch.dtype | None = torch.float64) -> None:
        self.model, self.widths = set_mode(copy_module(model).to(dtype)), widths
        self.drawing: Callable[[], AbstractContextManager[object]] = nullcontext
        self.tolerance = TOLERANCE if dtype else SINGLE_TOLERANCE
        self.generator = torch.Generator().manual_seed(0)
        device = next(model.parameters()).device
        inputs = draw_inputs(model, widths.example, self.generator, SAMPLES)
        self.inputs = [x.to(device, dtype if dtype and x.is_floating_point() else x.dtype) for x in inputs]
        for value in _list_values(self.model, widths):
            self._draw_again(value)

    def find_fault(self, names: Iterable[str]) -> str | None:
        """Say which change of the widths makes the network another function; None where all are followed.

        One copy goes through all changes, since each must leave the outputs as they are.
        """
        replica, widths = copy_module(self.model), copy.deepcopy(self.widths)
        names = list(names)
        orders = {name: torch.randperm(widths[name].size, generator=self.generator) for name in names}
        expected = self.run(replica)
        if not self._preserves(replica, widths, orders, expected):
            return "in another order of its channels the network is another function"
        separate = [name for name in names if not widths[name].mixed]
        growth = {name: grow_index(widths[name].size, 2) for name in separate}
        if not self._preserves(replica, widths, growth, expected):
            return "with fresh channels that nothing reads the network is another function"
        survivors = {name: self._draw_survivors(widths[name].size // 2) for name in separate}
        _stop_reading(replica, widths, survivors)
        if not self._preserves(replica, widths, survivors, self.run(replica)):
            return "without channels that nothing reads the network is another function"
        return None

    def _draw_survivors(self, size: int) -> Tensor:
        """Draw half of the channels, old and fresh: weight norm needs one that is read."""
        old, fresh = (torch.randperm(size, generator=self.generator) for _ in range(2))
        return torch.cat([old[: -(-size // 2)], size + fresh[: size // 2]]).sort().values

    def _preserves(
        self, replica: nn.Module, widths: Widths, indices: dict[str, Tensor], expected: list[Tensor]
    ) -> bool:
        """Change a copy, and tell whether its outputs are the expected ones."""
        if not indices:
            return True
        try:
            reindex(replica, widths, indices)
            outputs = self.run(replica)
        except Exception:  # a network that was followed wrongly may fail in any way
            return False
        pairs = zip(outputs, expected, strict=False)
        return len(outputs) == len(expected) and all(self.is_close(*pair) for pair in pairs)

    def run(self, model: nn.Module, seed: int = 0) -> list[Tensor]:
        """Run a copy on noise, and list its outputs."""
        devices = {x.device for x in self.inputs if x.device.type == "cuda"}
        with torch.no_grad(), quiet_hooks(model), torch.random.fork_rng(devices), self.drawing():
            # Without devices `torch.manual_seed` does no more, and takes a millisecond.
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
            return list_output_tensors(model(*self.inputs))

    def repeats(self, outputs: list[Tensor]) -> bool:
        """Tell whether the network gives the same again, whatever it draws."""
        return all(map(self.is_close, self.run(self.model, seed=1), outputs))

    def is_close(self, output: Tensor, expected: Tensor) -> bool:
        """Tell whether an output is the expected one, where that is a number at all."""
        if output.shape != expected.shape:
            return False
        finite = expected[expected.isfinite()].abs()
        scale = finite.max().item() if finite.numel() else 0.0
        return torch.allclose(output, expected, rtol=0, atol=self.tolerance * scale, equal_nan=True)

    def _draw_again(self, value: Tensor) -> None:
        """Draw anew what is a scalar a channel (away from neutral values), and what is constant."""
        if value.dim() == 1 or value[0].numel() == 1:
            value.copy_(0.5 + torch.rand(value.shape, generator=self.generator))
        elif value.min() == value.max():
            value.copy_(draw_he_normal(value, self.generator))


def _list_values(model: nn.Module, widths: Widths) -> Iterator[Tensor]:
    slots = {(slot.module, slot.tensor): None for width in widths.values() for slot in width.slots}
    for module, tensor in slots:
        yield from (item.value for item in list_tensors(model.get_submodule(module), tensor)[:1])


def _stop_reading(model: nn.Module, widths: Widths, indices: dict[str, Tensor]) -> None:
    """Set the weights to zero that read channels which an index leaves out."""
    for name, index in indices.items():
        is_left_out = torch.ones(widths[name].size, dtype=torch.bool).index_fill(0, index, False)
        for slot in widths[name].slots_with("in"):
            positions = widths.positions(slot, name)[is_left_out].flatten()
            items = list_tensors(model.get_submodule(slot.module), slot.tensor)
            norms = (item for item in items if item.norm is not None and slot.dim in item.dims)
            value = next(norms, items[0]).value.data  # a direction of zeros has no norm
            value.index_fill_(slot.dim, positions.to(value.device), 0)
