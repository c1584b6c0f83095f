"""Freeze a core: a network is pruned in steps to it, then re-constructed level by level around it.

Mangal, Kalra and Sapra, Towards Adaptive Deep Learning: Model Elasticity via Prune-and-Grow CNN
Architectures, arXiv 2505.11569. What is pruned keeps its place and its values in the network's storage;
growing back a level trains what it has beyond the level before it, and nothing else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.errors import OptionError
from elastic.levels.cutting import iterate_shared, mark_part
from elastic.levels.nested import Levels


@dataclass(frozen=True)
class Phase:
    """Name the epochs in which one level is trained: all of it, or (grown) what the level below has not."""

    level: int
    grown: bool
    epochs: range


def plan_phases(levels: int, epochs: int, dense: float, prune: float) -> list[Phase]:
    """Plan a run: the whole network, then smaller and smaller levels, then level by level what they lack.

    Args:
        levels: how many there are, the network among them.
        dense, prune: the parts of the run that go to the whole network and to pruning; the rest grows.

    Raises:
        OptionError: a phase would have no epoch, or nobody knows how many there are.
    """
    if epochs < 0:
        raise OptionError("each phase lasts a part of the run's epochs: set trainer.max_epochs")
    top, grow = levels - 1, 1 - dense - prune
    steps = [(top, False, dense)] * (dense != 0)
    steps += [(k, False, prune / top) for k in reversed(range(top))]
    steps += [(k, True, grow / top) for k in range(1, levels)]
    phases, begin = [], 0.0
    for level, grown, part in steps:
        span = range(round(begin * epochs), round((begin + part) * epochs))
        if part <= 0 or not span:
            raise OptionError(
                f"of {epochs} epochs none is left to {'grow' if grown else 'train'} level {level}: raise "
                f"trainer.max_epochs, or change dense={dense:g} and prune={prune:g} (parts of the run)"
            )
        phases.append(Phase(level, grown, span))
        begin += part
    return phases


@dataclass(frozen=True)
class _Entry:
    """Remember a parameter: what it was, and which of its entries may change."""

    parameter: Tensor
    before: Tensor
    trained: Tensor

    def restore(self) -> None:
        self.parameter.copy_(torch.where(self.trained, self.parameter, self.before))


class FrozenPart:
    """Freeze what a phase must not change: what lies outside its level, and, if it grows, the level below.

    Optimizers move weights whose gradient is zero, by decay and by momentum; so what is frozen is put back
    after each step, and stays what it was to the last bit. Norms are their level's own: those of other
    levels get no gradient.
    """

    def __init__(self, levels: Levels, phase: Phase) -> None:
        cut, below = levels.cuts[phase.level], levels.cuts[phase.level - 1] if phase.grown else None
        self._entries: list[_Entry] = []
        for path, name, tensor in iterate_shared(levels.net):
            if name in levels.net.get_submodule(path)._parameters:
                trained = mark_part(tensor, cut.get((path, name), ()))
                if below is not None:
                    trained &= ~mark_part(tensor, below.get((path, name), ()))
                self._entries.append(_Entry(tensor, tensor.detach().clone(), trained))

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what is frozen, as it was when this was made."""
        for entry in self._entries:
            entry.restore()
