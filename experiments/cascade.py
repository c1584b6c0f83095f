"""Show what levels save where the small ones answer what they are sure of: `elastic cascade runs='<glob>'`.

Each image of the test split goes to a small level, and on to the network itself where the likeliest class has
less than a threshold's probability. What it takes is the MACs of the levels that it went to.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elastic.errors import OptionError
from elastic.experiments.tools.arms import name_arms
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.experiments.tools.per_image import read_test_batches
from elastic.experiments.tools.restore import restore
from elastic.experiments.tools.tables import (
    check_targets,
    format_markdown,
    format_spread,
    print_table,
    write_between_marks,
    write_csv,
)
from elastic.levels.cascade import count_cascade_macs, fit_threshold, run_cascade
from elastic.measure.counts import count_macs
from elastic.ranges import Natural, Positive

HEAD = ("arm", "runs", "threshold", "by the small level (%)", "MACs, mean", "test acc (%)")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Outputs:
    """Hold what levels say of the test split, and their MACs."""

    logits_LNK: Sequence[Tensor]
    label_N: Tensor
    macs: Sequence[int]


@dataclass(frozen=True)
class Measured:
    """Hold what a cascade makes of the test split."""

    threshold: float
    small: float  # part of the images that the small level answers
    macs: float
    accuracy: float


@torch.inference_mode()
def compute_outputs(folder: Path, small: int = 0) -> Outputs:
    """Run the test split, in fp32, through a small level of a finished run and through its network.

    Raises:
        FileError: the folder holds no finished run, or one with kernel activation modules.
        OptionError: it tells no classes, or has no such level below the network.
    """
    finished = restore(folder).reject_modules().require_classes()
    network, below = finished.network, len(finished.network) - 1
    if small >= below:
        remedy = f"set small to one of 0 … {below - 1}" if below else "name a run that has some"
        raise OptionError(f"{folder} has {below} levels below the network, and no level {small}: {remedy}")
    nets = [network.plain(k) for k in (small, below)]
    batches = read_test_batches(finished.data)
    logits_LNK = [torch.cat([net(x_BCHW) for x_BCHW, _ in batches]) for net in nets]
    label_N = torch.cat([y_B for _, y_B in batches])
    return Outputs(logits_LNK, label_N, [count_macs(net, finished.example) for net in nets])


def measure_cascade(outputs: Outputs, threshold: float) -> Measured:
    """Measure a cascade by what its levels have said."""
    nets = [logits_NK.__getitem__ for logits_NK in outputs.logits_LNK]
    logits_NK, index_N = run_cascade(nets, torch.arange(len(outputs.label_N)), threshold)
    accuracy = (logits_NK.argmax(1) == outputs.label_N).double().mean()
    macs = count_cascade_macs(index_N, outputs.macs).mean()
    return Measured(threshold, float((index_N == 0).double().mean()), float(macs), float(accuracy))


def show_cascade(
    runs: str,
    small: Natural = 0,
    budget: Positive | None = None,
    csv: Path | None = None,
    markdown: Path | None = None,
) -> None:
    """Show accuracy and MACs of finished runs' levels as a cascade.

    Args:
        runs: a glob of their folders; seeds of an arm make a mean.
        small: the level that images go to first.
        budget: of MACs: adds the threshold at which images take so many, by their mean, labels unseen.
        csv: the table as a file.
        markdown: a text to put it into, between marks as those of compare.

    Raises:
        OptionError: there is no finished run.
        FileError: the table cannot be written.
    """
    check_targets("cascade", csv, markdown)
    arms = defaultdict[str, list[Outputs]](list)
    for folder, arm in name_arms(runs).items():
        arms[arm].append(compute_outputs(folder, small))
    if not arms:
        raise OptionError(f"there is no finished run among {runs}")
    rows = []
    for arm, outputs in arms.items():
        if budget is not None:
            fitted = [fit_threshold(output.logits_LNK, output.macs, budget) for output in outputs]
            rows.append(make_row(arm, [*map(measure_cascade, outputs, fitted)]))
        rows += [make_row(arm, [measure_cascade(output, t) for output in outputs]) for t in THRESHOLDS]
    print_table(HEAD, rows, width=110)
    if csv is not None:
        write_csv(csv, HEAD, rows)
    if markdown is not None:
        write_between_marks(markdown, "cascade", format_markdown(HEAD, rows))


def make_row(arm: str, measured: Sequence[Measured]) -> list[str]:
    """Make a row of the table: means over seeds, with their standard deviation where there are several."""
    return [
        *(
            arm,
            str(len(measured)),
            f"{statistics.mean(measurement.threshold for measurement in measured):.3f}",
        ),
        format_spread([100 * measurement.small for measurement in measured], 1),
        format_spread([measurement.macs for measurement in measured], 0),
        format_spread([100 * measurement.accuracy for measurement in measured]),
    ]


def main() -> None:
    silence()
    call(show_cascade)


if __name__ == "__main__":
    run(main)
