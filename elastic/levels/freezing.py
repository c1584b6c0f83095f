"""Prune-and-grow: a network is pruned in steps to a core, then re-constructed level by level around it.

Bui et al., Towards Adaptive Deep Learning: Model Elasticity via Prune-and-Grow CNN Architectures, arXiv
2505.11569. What is pruned keeps its place and its values in the network's storage; growing back a level
trains what it has beyond the level before it, and nothing else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.levels.nested import Levels
from elastic.surgery.layers import NORMS


@dataclass(frozen=True)
class Phase:
    """Epochs in which one level is trained: all of it, or (grown) what the level below has not."""

    level: int
    grown: bool
    epochs: range


def plan_phases(levels: int, epochs: int, dense: float, prune: float) -> list[Phase]:
    """The whole network, then smaller and smaller levels, then level by level what they lack.

    Args:
        levels: how many there are, the network among them.
        dense, prune: the parts of the run that go to the whole network and to pruning; the rest grows.

    Raises:
        StructureError: a phase would have no epoch.
    """
    top, grow = levels - 1, 1 - dense - prune
    steps = [(top, False, dense)] * (dense != 0)
    steps += [(k, False, prune / top) for k in reversed(range(top))]
    steps += [(k, True, grow / top) for k in range(1, levels)]
    found, done = [], 0.0
    for level, grown, part in steps:
        span = range(round(done * epochs), round((done + part) * epochs))
        if part <= 0 or not span:
            raise StructureError(
                f"of {epochs} epochs none is left to {'grow' if grown else 'train'} level {level}: raise "
                f"trainer.max_epochs, or change dense={dense:g} and prune={prune:g} (parts of the run)"
            )
        found.append(Phase(level, grown, span))
        done += part
    return found


class FrozenPart:
    """All that a phase must not change: what lies outside its level, and in a grown level the one below.

    Optimizers move weights whose gradient is zero, by decay and by momentum; so what is frozen is put back
    after each step, and stays what it was to the last bit. Norms are their level's own: those of other
    levels get no gradient.
    """

    def __init__(self, levels: Levels, phase: Phase) -> None:
        self._held: list[tuple[nn.Parameter, Tensor, tuple[slice, ...], tuple[slice, ...] | None]] = []
        cut, below = levels.cuts[phase.level], levels.cuts[phase.level - 1] if phase.grown else None
        for path, layer in levels.net.named_modules():
            for tensor, value in () if isinstance(layer, NORMS) else layer._parameters.items():
                if value is not None:
                    key = path, tensor
                    old = None if below is None else below.get(key, ())
                    self._held.append((value, value.detach().clone(), cut.get(key, ()), old))

    @torch.no_grad()
    def restore(self) -> None:
        for value, held, trained, below in self._held:
            new = value[trained].clone()
            if below is not None:
                new[below] = held[below]
            value.copy_(held)
            value[trained] = new
