"""Try the library from outside, at random from a seed, and write down what came of it.

    python -m experiments.campaign [seed=0] [scale=1] [to=<page>]

Options that cannot be, random changes of structure, damaged and hostile files, runs that are killed. The page
says what was tried, how often, and what was lost.
"""

import io
import platform
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from random import Random

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from elastic.errors import TrainingError
from elastic.experiments.tools.composition import CONF
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.experiments.tools.summary import find_device
from elastic.experiments.tools.trials import Part, files, kills, options, structure
from elastic.experiments.train import train
from elastic.files.atomic import write_atomically

# Of a campaign of scale 1, which takes some minutes on one core.
TRIALS = {"options": 800, "structure": 500, "files": 1500, "kills": 30}
CLAIMS = {"options": options.CLAIM, "structure": structure.CLAIM, "files": files.CLAIM, "kills": kills.CLAIM}
RUN = (
    *("trainer.max_epochs=6", "trainer.accelerator=cpu", "trainer.precision=32-true", "data.batch_size=128"),
    *("trigger=periodic", "trigger.every=2", "callbacks.growth.until=0.9", "callbacks.gates.begin=0.0"),
    *("callbacks.growth.amount.factor=1.3", "callbacks.gates.penalty=1", "callbacks.gates.grain=kernel"),
    *("callbacks.gates.grace=1", "optimizer.lr=0.1", "callbacks.progress=null", "logger=[]"),
    "trainer.log_every_n_steps=1",
)


def run_campaign(seed: int = 0, scale: float = 1.0, to: Path = Path("docs/reliability.md")) -> None:
    """Carry out a campaign, and write its page.

    Args:
        seed: of all that is drawn.
        scale: times the trials of each part.
        to: the page.

    Raises:
        TrainingError: something was lost; the page says what.
    """
    parts, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        for title, count in TRIALS.items():
            part = Part(title, CLAIMS[title])
            folder = Path(name) / title
            folder.mkdir()
            try_part(part, max(1, round(count * scale)), Random(seed), folder)
            print(f"{title}: {part.trials} trials, {len(part.faults)} faults", flush=True)
            parts.append(part)
    text = describe(parts, seed, scale, time.monotonic() - start)
    write_atomically(to, lambda part: part.write_text(text, encoding="utf-8"))
    if faults := sum(len(part.faults) for part in parts):
        raise TrainingError(f"{faults} trials have failed: {to} says which")


def try_part(part: Part, trials: int, random: Random, folder: Path) -> None:
    """Carry out the trials of one part."""
    if part.name == "options":
        options.try_options(part, trials, random, folder)
    elif part.name == "structure":
        structure.try_structure(part, trials, random, folder)
    elif part.name == "kills":
        kills.try_kills(part, trials, random, compose_run(folder), train, folder)
    else:
        with redirect_stdout(io.StringIO()):
            train(compose_run(folder / "run"), folder / "run")
        files.try_files(part, trials, random, folder / "run", folder / "copy")


def compose_run(folder: Path) -> DictConfig:
    """Compose a small run that grows and prunes itself."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = [f"run={folder}", f"hydra.runtime.output_dir={folder}", *RUN]
        cfg = compose("config", given, return_hydra_config=True)
    with open_dict(cfg), read_write(cfg):
        HydraConfig.instance().set_config(cfg)
        OmegaConf.resolve(cfg.choices)
        cfg.name = "campaign"
        del cfg["hydra"]
    return cfg


def describe(parts: list[Part], seed: int, scale: float, seconds: float) -> str:
    """Describe a campaign as a page."""
    rows = [f"| {part.name} | {part.claim} | {part.trials:,} | {len(part.faults)} |" for part in parts]
    outcomes = [
        f"| {part.name} | {outcome} | {count:,} |"
        for part in parts
        for outcome, count in sorted(part.outcomes.items())
    ]
    faults = [f"- {part.name}: `{fault}`" for part in parts for fault in part.faults[:20]]
    head = "What was tried from outside, how often, and what was lost. `make campaign` writes this page."
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}"
    lines = ["# Reliability", "", head, ""]
    lines += ["| part | what must hold | trials | lost |", "|---|---|---|---|", *rows, ""]
    lines += ["## How trials ended", "", "| part | end | trials |", "|---|---|---|", *outcomes, ""]
    if faults:
        lines += ["## What was lost", "", *faults, ""]
    lines += ["## Repeat it", "", "```", f"make campaign ARGS='seed={seed} scale={scale:g}'", "```", ""]
    lines += [f"It took {seconds / 60:.0f} minutes on one thread of {find_device()}, with {versions}."]
    lines += ["Trials follow from the seed, but for the moments of kills, which depend on the machine.", ""]
    return "\n".join(lines)


def main() -> None:
    silence()
    torch.set_num_threads(1)
    call(run_campaign)


if __name__ == "__main__":
    run(main)
