"""Do what every way of pruning by gates does."""

import lightning as L

from elastic.callbacks.base import list_elastic
from elastic.errors import TrainingError
from elastic.pruning.dead import find_removable_channels
from elastic.pruning.fitting import check_budget_reachable
from elastic.pruning.gates import Grain, attach_gates, find_grain, iterate_gates, thaw_gates
from elastic.surgery.freezing import find_frozen_widths
from elastic.training.structure import Structure


def attach_once(structure: Structure, grain: Grain, grace: int = 0) -> None:
    """Gate the network, unless an earlier fit has done so, or a checkpoint.

    Raises:
        TrainingError: by gates of another grain.
    """
    present = find_grain(structure.net)
    if present not in (None, grain):
        raise TrainingError(
            f"the network has gates of grain '{present}', not '{grain}': prune it by those, or put what "
            "elastic.compact makes of it in its place first"
        )
    if present is None:
        attach_gates(structure.net, structure.widths, grain, copies=structure.copies)
    thaw_gates(structure.net)
    for _, _, gate in iterate_gates(structure.net):
        gate.set_grace(grace)


def check_budget(
    trainer: L.Trainer, structure: Structure, target: int, end: float, by: str = "params"
) -> None:
    """Refuse, before a run begins, a budget for `end` of it that cannot be met.

    Raises:
        TrainingError: the network may grow later.
        OptionError: less than what stays when every layer keeps one gate open.
    """
    if trainer.ckpt_path is not None:
        return
    last = max(callback.find_last_growth(trainer) for callback in list_elastic(trainer))
    if last > end:
        raise TrainingError(
            f"growth goes on to {last:.0%} of the run, but the budget is met at {end:.0%}: lower "
            "callbacks.growth.until, or let pruning end later"
        )
    check_budget_reachable(structure.net, structure.example, target, by)


def remove_dead_channels(structure: Structure) -> None:
    """Remove the channels that gates have shut off, in all processes alike."""
    removable = find_removable_channels(structure.net, structure.widths, structure.example)
    frozen = find_frozen_widths(structure.net, structure.widths)
    keep = structure.agree({name: index for name, index in removable.items() if name not in frozen})
    if keep:
        structure.restructure(keep, "prune: channels without effect")
