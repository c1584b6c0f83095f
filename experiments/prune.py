"""Prune a finished run's network at once, to a part of its MACs: `elastic prune run=<folder> to=<folder>`.

The folder that comes of it is one of a finished run: `elastic train init=<folder>` tunes what is left.
By an importance of channels all widths are cut alike; by sensitivity those that cost least for what they
save, each by l2. The peer's pruner (extra `peers`) stands beside, at the same MACs, with its own defaults.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from elastic.errors import FileError, OptionError
from elastic.experiments.sensitivity import Evaluator
from elastic.experiments.tools.about import describe_run
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.folders import lock_folder, write_config
from elastic.experiments.tools.options import call
from elastic.experiments.tools.restore import FinishedRun, restore
from elastic.experiments.tools.summary import find_revision, measure_network, write_summary
from elastic.files.network import Network
from elastic.files.sums import find_digest
from elastic.files.zoo import WEIGHTS
from elastic.levels.importance import score_channels
from elastic.levels.sensitivity import keep_best, measure_sensitivity
from elastic.levels.sizes import level_sizes
from elastic.measure.counts import count_macs
from elastic.widths.discovery import discover
from elastic.widths.width import Widths

IMAGES = 1000  # of the validation split, that sensitivity looks at
STEPS = 10  # of bisection, for the peer's ratio


def prune_run(run: Path, to: Path, part: float = 0.5, by: str = "l2", seed: int = 0) -> None:
    """Prune a finished run's network to a part of its MACs, without training.

    Args:
        run: the folder of a finished run.
        to: the folder that comes of it.
        part: of the MACs, at most.
        by: l2, l1 or norm (all widths alike), sensitivity, random or torch_pruning.
        seed: of what is random.

    Raises:
        FileError: there is no finished run, or one with kernel activation modules, or `to` holds one already.
        OptionError: no such way or part.
    """
    if by not in PRUNERS:
        raise OptionError(f"nothing is pruned by '{by}': choose {', '.join(PRUNERS)}")
    if not 0 < part < 1:
        raise OptionError(f"part={part} cannot be: give one between 0 and 1")
    finished = restore(run).reject_modules()
    if (to / WEIGHTS).exists():
        raise FileError(f"{to} holds a network already: name another folder")
    torch.manual_seed(seed)
    net = finished.network.plain()
    pruned = PRUNERS[by](finished, net, part * count_macs(net, finished.example))
    with lock_folder(to):
        write_run(finished, pruned.eval(), to, by)


def write_run(finished: FinishedRun, net: nn.Module, folder: Path, by: str) -> None:
    """Write a pruned network as a finished run."""
    network = Network(net)
    measured = measure_network(network, finished.data, finished.task)
    # What callbacks and validation have said, `val/acc` or `budget/actual`, is of the network before.
    facts = {key: value for key, value in finished.summary.items() if "/" not in key}
    summary = facts | measured | {"pruned": by, "git": find_revision()}
    network.save(folder / WEIGHTS, describe_run(finished.config, finished.data, summary))
    write_config(finished.config, folder)
    write_summary(summary | {"weights": find_digest(folder / WEIGHTS)}, folder)
    print(
        f"{measured['macs']:,} MACs of {finished.summary['macs']:,}, {measured['params']:,} params: {folder}"
    )


def prune_alike(score: Callable[[nn.Module, Widths], Mapping[str, Tensor]]) -> "Pruner":
    """Make a pruner that takes the same part of each width, by scores of its channels."""

    def prune(finished: FinishedRun, net: nn.Module, macs: float) -> nn.Module:
        widths = discover(net, finished.example)
        (sizes,) = level_sizes(net, widths, finished.example, [macs], by="macs")
        return keep_best(net, widths, sizes, score(net, widths))

    return prune


def score_at_random(net: nn.Module, widths: Widths) -> dict[str, Tensor]:
    """Score channels by chance."""
    return {name: torch.rand(width.size) for name, width in widths.items()}


def prune_by_sensitivity(finished: FinishedRun, net: nn.Module, macs: float) -> nn.Module:
    """Prune the widths that cost least for what they save, each to its channels of largest norm."""
    widths = discover(net, finished.example)
    evaluate = Evaluator(finished.data, finished.task, IMAGES)
    curves = measure_sensitivity(net, widths, finished.example, evaluate)
    (sizes,) = level_sizes(net, widths, finished.example, [macs], by="macs", curves=curves)
    return keep_best(net, widths, sizes, score_channels(net, widths))


def prune_by_peer(finished: FinishedRun, net: nn.Module, macs: float) -> nn.Module:
    """Let Torch-Pruning prune all groups by its group norm, by the least ratio that is within the MACs."""
    within, beyond = 1.0, 0.0
    for _ in range(STEPS):
        ratio = (within + beyond) / 2
        pruned = _prune_by_ratio(net, finished.example, ratio)
        within, beyond = (ratio, beyond) if count_macs(pruned, finished.example) <= macs else (within, ratio)
    return _prune_by_ratio(net, finished.example, within)


def _prune_by_ratio(net: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise OptionError("torch_pruning is not installed: install the extra `peers`") from error
    pruned = copy.deepcopy(net)
    head = [layer for layer in pruned.modules() if isinstance(layer, nn.Linear)][-1]
    importance = tp.importance.MagnitudeImportance()
    tp.pruner.BasePruner(pruned, example, importance, pruning_ratio=ratio, ignored_layers=[head]).step()
    return pruned


Pruner = Callable[[FinishedRun, nn.Module, float], nn.Module]
PRUNERS: dict[str, Pruner] = {
    "l2": prune_alike(lambda net, widths: score_channels(net, widths, "l2")),
    "l1": prune_alike(lambda net, widths: score_channels(net, widths, "l1")),
    "norm": prune_alike(lambda net, widths: score_channels(net, widths, "norm")),
    "sensitivity": prune_by_sensitivity,
    "random": prune_alike(score_at_random),
    "torch_pruning": prune_by_peer,
}


def main() -> None:
    silence()
    call(prune_run)


if __name__ == "__main__":
    run(main)
