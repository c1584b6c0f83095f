"""Check widths on the real network: what is followed wrongly is found before training, and fixed by name.

A copy of the network, its norms and biases drawn at random so that no channel is like another, must be the
same function after its widths are permuted, and after channels that nothing reads have come or gone.
"""

import copy
from collections.abc import Container, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from elastic.errors import StructureError
from elastic.surgery.fresh import draw_he_normal
from elastic.surgery.indices import grow_index
from elastic.surgery.layers import list_tensors
from elastic.surgery.reindexing import reindex
from elastic.widths.width import Segment, Slot, Width, Widths

TOLERANCE = 1e-6  # of the largest output, in double precision
SINGLE_TOLERANCE = 1e-3  # the same, in the model's own, for a model that does not run in another


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
            probe.run(probe.model)
            return probe
        except Exception as error:  # the model's own code runs here: anything may come
            fault = str(error).strip().split("\n")[0]
    raise StructureError(f"the model does not run on noise of the example's shape: {fault}")


def fix_widths(widths: Widths, reasons: dict[str, str]) -> None:
    """Take widths out of those that can change; where their channels lie, they count as constant."""
    sizes = widths.sizes()
    for name, width in list(widths.items()):
        slots = tuple(_fix_slot(slot, reasons, sizes) for slot in width.slots)
        widths.widths[name] = Width(name, width.size, slots, width.mixed)
    for name, reason in reasons.items():
        del widths.widths[name]
        widths.fixed[name] = reason


def _fix_slot(slot: Slot, names: Container[str], sizes: dict[str, int]) -> Slot:
    segments: list[Segment] = []
    for segment in slot.layout:
        if segment.width is not None and segment.width in names:
            segment = Segment(None, segment.repeat * sizes[segment.width])
        if segments and segment.width is None and segments[-1].width is None:  # constants side by side
            segment = Segment(None, segments.pop().repeat + segment.repeat)
        segments.append(segment)
    return Slot(slot.module, slot.tensor, slot.dim, slot.role, tuple(segments))


class _Probe:
    """Try changes on copies of a network."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, widths: Widths, dtype: torch.dtype | None = torch.float64) -> None:
        self.model, self.widths = copy.deepcopy(model).to(dtype).eval(), widths
        self.tolerance = TOLERANCE if dtype else SINGLE_TOLERANCE
        self.generator = torch.Generator().manual_seed(0)
        device = next(model.parameters()).device
        self.inputs = [self._draw_input(x, dtype).to(device) for x in widths.example]
        for value in _list_values(self.model, widths):
            self._draw_again(value)

    def find_fault(self, names: Iterable[str]) -> str | None:
        """Say which change of the widths makes the network another function; None where all are followed."""
        names = list(names)
        sizes = {name: self.widths[name].size for name in names}
        orders = {name: torch.randperm(size, generator=self.generator) for name, size in sizes.items()}
        if not self._preserves(orders):
            return "in another order of its channels the network is another function"
        unmixed = {name: size for name, size in sizes.items() if not self.widths[name].mixed}
        if not self._preserves({name: grow_index(size, 2) for name, size in unmixed.items()}):
            return "with fresh channels that nothing reads the network is another function"
        several = {name: orders[name][: -(-size // 2)].sort().values for name, size in unmixed.items()}
        if not self._preserves(several, is_pruning=True):
            return "without channels that nothing reads the network is another function"
        return None

    def _preserves(self, indices: dict[str, Tensor], is_pruning: bool = False) -> bool:
        """Tell whether a change leaves the outputs as they are; what is pruned is not read before, either."""
        replica, widths = copy.deepcopy(self.model), copy.deepcopy(self.widths)
        if is_pruning:
            _stop_reading(replica, widths, indices)
        expected = self.run(replica)
        try:
            reindex(replica, widths, indices)
            outputs = self.run(replica)
        except Exception:  # a network that was followed wrongly may fail in any way
            return False
        pairs = zip(outputs, expected, strict=False)
        return len(outputs) == len(expected) and all(self._is_close(*pair) for pair in pairs)

    def run(self, model: nn.Module) -> list[Tensor]:
        """Run a copy on noise, and list its outputs."""
        with torch.no_grad():
            return [y for y in tree_leaves(model(*self.inputs)) if isinstance(y, Tensor)]

    def _is_close(self, output: Tensor, expected: Tensor) -> bool:
        if output.shape != expected.shape:
            return False
        scale = expected.abs().max().item() if expected.numel() else 0.0
        return torch.allclose(output, expected, rtol=0, atol=self.tolerance * scale)

    def _draw_input(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        if not x.is_floating_point():
            return torch.zeros(x.shape, dtype=x.dtype)
        return torch.randn(x.shape, generator=self.generator).to(dtype or x.dtype)

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
        rest = torch.ones(widths[name].size, dtype=torch.bool).index_fill(0, index, False)
        for slot in widths[name].slots_with("in"):
            positions = widths.positions(slot, name)[rest].flatten()
            for item in list_tensors(model.get_submodule(slot.module), slot.tensor)[:1]:
                item.value.data.index_fill_(slot.dim, positions.to(item.value.device), 0)
