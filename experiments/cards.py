"""Write the networks of the zoo and their cards from recorded runs: `python -m experiments.cards`.

An entry names a recorded run and says in words what it is; every number comes from its files. Class names are
read from the data sets, under ELASTIC_DATA; latencies are measured on this machine, all networks in turn.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.experiments.results import ROOT, read_summaries
from elastic.experiments.tools.about import describe_run
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.hardware import find_cpu
from elastic.experiments.tools.restore import FinishedRun, restore
from elastic.experiments.tools.tables import format_spread
from elastic.experiments.tools.timing import time_runs
from elastic.files.cards import PROTOCOL, write_card
from elastic.files.zoo import ZOO

LICENCE = "Apache-2.0"
LEVELS = "elastic train experiment=cifar10_levels data.augment.cutout.size=0"
DENSE = "outputs/dense"


@dataclass(frozen=True)
class Entry:
    """Declare a network of the zoo.

    Args:
        name: that it is loaded by.
        folder: of the recorded run, `<question>/<arm>-seed0`: the first seed, which nobody chose.
        summary: what it is, in a sentence.
        command: that trains it, from the data on.
    """

    name: str
    folder: str
    summary: str
    command: str


ENTRIES = (
    Entry(
        "digits-gnap-2k",
        "first_runs/early_path-seed0",
        "A CNN for 8×8 grey digits that grew when training saturated and pruned itself to 2,000 parameters.",
        "elastic train experiment=digits seed=0",  # at the commit that the card names
    ),
    Entry(
        "mnist-gnap-3k",
        "gnap_mnist/small-seed0",
        "A CNN for MNIST that grew from 979 to 30,934 parameters and pruned itself to 3,100.",
        "elastic train experiment=mnist seed=0",
    ),
    Entry(
        "mnist-gnap-6k",
        "gnap_mnist/best-seed0",
        "A CNN for MNIST that grew from 979 to 54,634 parameters and pruned itself to 6,200.",
        "elastic train experiment=mnist seed=0 callbacks.gates.budget.target=6200 \\\n"
        "    callbacks.growth.amount.ceiling=8",
    ),
    Entry(
        "cifar10-gnap-157k",
        "gnap_cifar10/small-seed0",
        "A ResNet-20 for CIFAR-10 that grew from half its width and pruned itself to 157,800 parameters.",
        "elastic train experiment=cifar10 seed=0 data.val_fraction=0 \\\n"
        "    timeline=experiments/gnap_cifar10/decided-seed0/timeline.jsonl",
    ),
    Entry(
        "cifar10-resnet20-levels",
        "prune_and_grow/resnet20-joint-seed0",
        "Four nested networks in one ResNet-20 for CIFAR-10, switched at run time without retraining.",
        f"{LEVELS} schedule=static run={DENSE}\n{LEVELS} schedule=[joint,distil] init={DENSE} \\\n"
        "    callbacks.joint.between=1 optimizer.lr=0.05 trainer.max_epochs=8",
    ),
    Entry(
        "cifar10-resnet20-dynamic",
        "dynamic_pruning/resnet20-distil-seed0",
        "A ResNet-20 for CIFAR-10 whose kernels are switched on and off by each image.",
        f"{LEVELS} schedule=static run={DENSE}\n"
        "elastic train experiment=cifar10_dynamic schedule=[dynamic,distil] optimizer=adamw \\\n"
        "    data.augment.cutout.size=0 callbacks.dynamic.begin=0.0 callbacks.dynamic.end=0.4 \\\n"
        f"    init={DENSE} \\\n"
        "    optimizer.lr=1.5e-3 optimizer.weight_decay=0.02 callbacks.dynamic.gain=150 \\\n"
        "    callbacks.dynamic.target=0.447 trainer.max_epochs=26 \\\n"
        "    callbacks.distil.teacher.run=experiments/gnap_cifar10/small-seed0",
    ),
)


def write_zoo(entries: Sequence[Entry] = ENTRIES, zoo: Path = ZOO) -> None:
    """Write networks and cards."""
    folders = [ROOT / "experiments" / entry.folder for entry in entries]
    runs = [restore(folder) for folder in folders]
    summaries = {folder: dict(finished.summary) for folder, finished in zip(folders, runs, strict=True)}
    method, cpu = time_runs(summaries, time.process_time), find_cpu().partition(",")[0]
    latency = f"{method.capitalize()}; processor time of {cpu}."
    zoo.mkdir(exist_ok=True)
    for entry, finished in zip(entries, runs, strict=True):
        about = describe_entry(entry, finished, summaries[finished.folder]) | {"latency": latency}
        finished.network.save(zoo / f"{entry.name}.safetensors", about)
        (zoo / f"{entry.name}.md").write_text(write_card(entry.name, about))
        print(f"{entry.name}: {(zoo / entry.name).with_suffix('.safetensors').stat().st_size:,} bytes")


def describe_entry(entry: Entry, finished: FinishedRun, summary: dict[str, Any]) -> dict[str, Any]:
    """Describe a network of the zoo, in plain containers."""
    finished.data.download = False
    finished.data.prepare_data()  # which knows the names of classes
    about = describe_run(finished.config, finished.data, summary)
    about["made"] |= {"command": entry.command}
    question, _, arm = entry.folder.partition("/")
    seeds = read_summaries(ROOT / "experiments" / question, arm.partition("-seed")[0])
    protocol = PROTOCOL
    if len(seeds) > 1:
        spread = format_spread([100 * seed["test/acc"] for seed in seeds])
        protocol += f" Seed {summary['seed']} of {len(seeds)}, which have {spread} % (mean ± sd)."
    return about | {"summary": entry.summary, "protocol": protocol, "licence": LICENCE}


def main() -> None:
    silence()
    write_zoo()


if __name__ == "__main__":
    run(main)
