"""Try the library from outside, at random from a seed, and write down what came of it.

    python -m experiments.campaign [seed=0] [full=true] [only=kills,files] [to=<page>]

Options that cannot be, random changes of structure, damaged and hostile files, runs that are killed, what a
machine may do to a run, runs that are long, the kernel under checkers, and licences. The page says what was
tried, how often, and what was lost.
"""

import io
import json
import platform
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
import torch

import elastic.experiments.train as training
from elastic.errors import OptionError, TrainingError
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.hardware import find_device
from elastic.experiments.tools.options import call
from elastic.experiments.tools.trials import (
    Part,
    faults,
    files,
    kernel,
    kills,
    long,
    options,
    structure,
    supply,
)
from elastic.experiments.tools.trials.composing import CHANGING, compose_run
from elastic.files.atomic import write_atomically
from elastic.ranges import Positive, Seed

# How often each part tries: in some minutes on one core, and in full.
TRIALS: dict[str, tuple[int, int]] = {
    "options": (800, 2000),
    "structure": (500, 10_000),
    "files": (1500, 5000),
    "kills": (30, 2000),
    "faults": (20, 200),
    "long": (1000, 1_000_000),
    "kernel": (300, 50_000),
    "supply": (1, 1),
}
CLAIMS = {
    "options": options.CLAIM,
    "structure": structure.CLAIM,
    "files": files.CLAIM,
    "kills": kills.CLAIM,
    "faults": faults.CLAIM,
    "long": long.CLAIM,
    "kernel": kernel.CLAIM,
    "supply": supply.CLAIM,
}
RESULTS = Path("outputs/campaign")  # of each part, until it is tried again
RUN = (*CHANGING, "trainer.max_epochs=6", "data.batch_size=128", "logger=[]", "trainer.log_every_n_steps=1")
Result = dict[str, Any]


def run_campaign(
    seed: Seed = 0,
    full: bool = False,
    scale: Positive = 1.0,
    only: str = "",
    to: Path = Path("docs/reliability.md"),
    results: Path = RESULTS,
) -> None:
    """Carry out a campaign, and write its page.

    Args:
        seed: of all that is drawn.
        full: try as often as is said of the project, which takes about an hour on two cores.
        scale: times the trials of each part.
        only: parts, all by default; the page is made of these and of those that were tried before.
        to: the page.
        results: where each part leaves what it has come to, for the page.

    Raises:
        OptionError: there is no such part.
        TrainingError: something was lost; the page says what.
    """
    names = only.split(",") if only else list(TRIALS)
    for name in names:
        if name not in TRIALS:
            raise OptionError(f"there is no part {name} of a campaign: choose of {', '.join(TRIALS)}")
    lost = 0
    for name in names:
        part, start = Part(name, CLAIMS[name]), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try_part(part, max(1, round(TRIALS[name][full] * scale)), Random(seed), Path(folder))
        seconds = time.monotonic() - start
        lost += len(part.faults)
        print(f"{name}: {part.trials:,} trials, {len(part.faults)} lost, {seconds / 60:.1f} min", flush=True)
        words = f"only={name} seed={seed}" + describe_count(full, scale)
        write_result(part, f"make campaign ARGS='{words}'", seconds, results)
    text = describe(read_results(results))
    write_atomically(to, lambda part: part.write_text(text, encoding="utf-8"))
    if lost:
        raise TrainingError(f"{lost} trials have failed: {to} says which")


def describe_count(full: bool, scale: float) -> str:
    """Describe how often is tried, as a command line has it."""
    return " full=true" * full + f" scale={scale:g}" * (scale != 1)


def try_part(part: Part, trials: int, random: Random, folder: Path) -> None:
    """Carry out the trials of one part."""
    picture = training.draw_history
    training.draw_history = write_picture  # type: ignore[assignment]
    try:
        PARTS[part.name](part, trials, random, folder)
    finally:
        training.draw_history = picture


def write_picture(history: Any, timeline: Any, path: Path, *_: Any) -> None:
    """Write a file in place of a picture, which takes as long as the small runs of trials."""
    write_atomically(path, lambda part: part.write_bytes(b"a picture"))


def _try_files(part: Part, trials: int, random: Random, folder: Path) -> None:
    with redirect_stdout(io.StringIO()):
        training.train(compose_run(folder / "run", RUN), folder / "run")
    files.try_files(part, trials, random, folder / "run", folder / "copy")


def _try_kills(part: Part, trials: int, random: Random, folder: Path) -> None:
    kills.try_kills(part, trials, random, training.train, folder)


PARTS: dict[str, Callable[[Part, int, Random, Path], None]] = {
    "options": options.try_options,
    "structure": structure.try_structure,
    "files": _try_files,
    "kills": _try_kills,
    "faults": faults.try_faults,
    "long": long.try_long,
    "kernel": kernel.try_kernel,
    "supply": supply.try_supply,
}


def write_result(part: Part, command: str, seconds: float, folder: Path) -> None:
    """Write down what a part has come to."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}"
    result = asdict(part) | {"command": command, "minutes": seconds / 60}
    result |= {"machine": find_device(), "versions": versions}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    write_atomically(folder / f"{part.name}.json", lambda file: file.write_text(text, encoding="utf-8"))


def read_results(folder: Path) -> list[Result]:
    """Read what parts have come to, in the order in which they are tried; others come last."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    order = list(TRIALS)
    return sorted(results, key=lambda result: (*order, result["name"]).index(result["name"]))


def describe(results: list[Result]) -> str:
    """Describe a campaign as a page."""
    rows = [f"| {r['name']} | {r['claim']} | {r['trials']:,} | {len(r['faults'])} |" for r in results]
    outcomes = [
        f"| {result['name']} | {outcome} | {count:,} |"
        for result in results
        for outcome, count in sorted(result["outcomes"].items())
    ]
    lost = [f"- {r['name']}: `{leave_out_folders(fault)}`" for r in results for fault in r["faults"][:20]]
    notes = (f"  # {r['minutes']:.0f} minutes" if r["minutes"] is not None else "" for r in results)
    commands = [r["command"] + note for r, note in zip(results, notes, strict=True)]
    places = dict.fromkeys(f"{r['machine']}, with {r['versions']}" for r in results)
    head = "What was tried from outside, how often, and what was lost. `make campaign` writes this page."
    lines = ["# Reliability", "", head, ""]
    lines += ["| part | what must hold | trials | lost |", "|---|---|---|---|", *rows, ""]
    lines += ["## How trials ended", "", "| part | end | trials |", "|---|---|---|", *outcomes, ""]
    if lost:
        lines += ["## What was lost", "", *lost, ""]
    lines += [
        "## Repeat it",
        "",
        "```",
        *commands,
        "```",
        "",
        f"Each on one thread of {'; of '.join(places)}.",
    ]
    lines += ["Trials follow from the seed. Parts may run side by side; each brings the page up to date.", ""]
    return "\n".join(lines)


def leave_out_folders(text: str) -> str:
    """Leave folders out of the paths in a text: they are of the machine."""
    return re.sub(r"(?<!\w)/(?:[^/\s'\"]+/)+", "…/", text)


def main() -> None:
    silence()
    torch.set_num_threads(1)
    call(run_campaign)


if __name__ == "__main__":
    run(main)
