"""Train one run: `elastic train [experiment=<name>] [any Hydra override] [-m]`.

The run's folder gets the resolved configuration, `last.ckpt`, `timeline.jsonl`, the logger's files,
`model.safetensors` (compacted), `summary.json` and `history.png`. `run=<folder>` continues a run.
"""

import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from elastic.callbacks import Census
from elastic.callbacks.base import list_elastic
from elastic.data import ImageData
from elastic.errors import OptionError, TrainingError
from elastic.experiments.tools.about import describe_run
from elastic.experiments.tools.checking import check_options
from elastic.experiments.tools.compatibility import let_hydra_start
from elastic.experiments.tools.composition import CONF, check_words, list_callbacks, remove_leftovers, rewrite
from elastic.experiments.tools.environment import (
    EndOnSignals,
    StayStopped,
    check_processes,
    explain_faults,
    is_multirun,
    silence,
)
from elastic.experiments.tools.errors import pass_hydra, run
from elastic.experiments.tools.figure import draw_history
from elastic.experiments.tools.folders import (
    CONFIG,
    RunMark,
    check_finished,
    continue_config,
    find_checkpoint,
    lock_folder,
    make_portable,
    write_config,
)
from elastic.experiments.tools.hardware import choose_precision
from elastic.experiments.tools.loggers import LoggerMark, make_loggers
from elastic.experiments.tools.memory import check_memory
from elastic.experiments.tools.options import HELP
from elastic.experiments.tools.parts import make_callbacks, make_recipe, make_task
from elastic.experiments.tools.publish import publish
from elastic.experiments.tools.restore import build_network
from elastic.experiments.tools.signals import AGAIN, advise, follow_parent
from elastic.experiments.tools.summary import (
    find_revision,
    measure_network,
    show,
    summarise,
    write_summary,
)
from elastic.experiments.tools.sweep import complete_sweep, note_failure, read_objectives, run_in_sweep
from elastic.experiments.tools.training_help import describe_training
from elastic.experiments.tools.trust import trust_modules
from elastic.files.atomic import write_lines
from elastic.files.network import Network
from elastic.files.sums import find_digest
from elastic.files.zoo import WEIGHTS
from elastic.pruning.compaction import compact
from elastic.training.compilation import compile_network
from elastic.training.module import ElasticModule
from elastic.training.structure import Structure


def build(cfg: DictConfig) -> tuple[ElasticModule, ImageData]:
    """Build the network and its data, as the configuration describes them before anything has changed."""
    net, data = build_network(cfg, check_memory)
    levels = None
    if cfg.get("init") is not None:
        weights = check_finished(Path(cfg.init).expanduser()) / WEIGHTS
        network = Network.load(weights, net, torch.zeros(1, *data.shape))
        network.reject_modules(weights)
        levels = network.levels if "dynamic" in list_callbacks(cfg) else None  # each gets modules of its own
        net.train()
    module = ElasticModule(net, data.shape, make_task(cfg, data.classes), *make_recipe(cfg), cfg.seed)
    if levels is not None:
        module.structure.nest(levels)
        module.train()
    return module, data


def train(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Carry out a run in its folder, from the start or from its last checkpoint; return the summary.

    Raises:
        BusyError: another process does.
    """
    check_options(cfg)
    with lock_folder(folder):
        if not is_multirun():
            advise(lambda: f"go on with elastic train run={folder}" if (folder / CONFIG).exists() else AGAIN)
        silence()
        find_revision()  # of the code that trains, not of what is there when it has
        if cfg.threads is not None:
            torch.set_num_threads(cfg.threads)
        with explain_faults() as setting_up:
            callbacks = [
                *make_callbacks(cfg).values(),
                RunMark(cfg),
                LoggerMark(cfg),
                EndOnSignals(),
                StayStopped(),
                setting_up,
            ]  # may build networks
            module, data = build(cfg)
            last, states = find_checkpoint(folder, cfg)
            trainer = make_trainer(cfg, callbacks, folder, states.get(LoggerMark.__name__))
            setting_up.checkpoint = last
            fit(cfg, trainer, module, data, last)
            return finish(cfg, trainer, module, data, folder) if trainer.is_global_zero else {}


def make_trainer(
    cfg: DictConfig,
    callbacks: list[L.Callback],
    folder: Path,
    log_ids: Mapping[str, str] | None = None,
) -> L.Trainer:
    """Make the trainer of a run, and refuse what it could not carry out.

    Args:
        log_ids: what servers call the run that goes on, see `make_loggers`.

    Raises:
        TrainingError: processes or callbacks that cannot be in one run.
    """
    if cfg.trainer.get("max_epochs") in (None, -1) and not is_bounded(cfg):
        raise TrainingError("nothing ends this run: set trainer.max_epochs to 1 or more")
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        precision=choose_precision(cfg.trainer.precision),
        callbacks=callbacks,
        logger=make_loggers(cfg, log_ids),
        enable_progress_bar="progress" in list_callbacks(cfg),
        default_root_dir=folder,
    )
    check_processes(trainer)
    for callback in list_elastic(trainer):
        callback.check(trainer)
    return trainer


def is_bounded(cfg: DictConfig) -> bool:
    """Tell whether steps or time end a run."""
    return cfg.trainer.get("max_steps", -1) > 0 or cfg.trainer.get("max_time") is not None


def fit(
    cfg: DictConfig, trainer: L.Trainer, module: ElasticModule, data: ImageData, last: Path | None
) -> None:
    """Train, from the start or from the last checkpoint."""
    folder = Path(trainer.default_root_dir)
    if trainer.is_global_zero:
        write_config(cfg, folder)  # a run that goes on may last for longer
    if mode := cfg.get("compile"):
        compile_network(module.net, mode=None if mode is True else mode)
    trainer.ckpt_path = last  # given to `fit`, callbacks would not know of it while they are set up
    trainer.fit(module, data)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # the first process goes on alone


def finish(
    cfg: DictConfig, trainer: L.Trainer, module: ElasticModule, data: ImageData, folder: Path
) -> dict[str, Any]:
    """Measure the network once on the test split, and write down and show what the run has come to."""
    structure = module.cpu().float().structure  # saved and measured in 32 bits, whatever it was trained in
    network = make_network(structure)
    census = next((callback for callback in list_elastic(trainer) if isinstance(callback, Census)), None)
    costs = (None, None) if census is None else (census.seconds, census.macs_training)
    history = [] if census is None else census.history
    # `current_epoch` may be one less where a run goes on that had ended.
    epochs = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    summary = summarise(cfg, epochs, measure_network(network, data, module.task), *costs)
    metric = f"val/{module.task.metric}"
    summary[metric] = history[-1].get(metric) if history else None
    for callback in list_elastic(trainer):
        summary |= callback.report()
    network.save(folder / WEIGHTS, describe_run(cfg, data, summary))
    summary["weights"] = find_digest(folder / WEIGHTS)
    write_lines(folder / "history.jsonl", history)
    draw_history(history, structure.timeline, folder / "history.png", module.task.metric)
    write_summary(summary, folder)
    options = OmegaConf.to_container(make_portable(cfg), resolve=True)
    for logger in trainer.loggers:
        publish(logger, folder, options, summary, history, structure.timeline)
    show(summary, history, folder)
    return summary


def make_network(structure: Structure) -> Network:
    """Make what a run leaves of a network: compacted, unless levels or modules know its channels."""
    for net in structure.nets:
        net.eval()
    if structure.levels is not None:
        return Network(structure.levels, structure.dynamic_nets)
    if structure.dynamic_nets:
        return Network(structure.net, structure.dynamic_nets)
    return Network(compact(structure.net, structure.example))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run_job(cfg: DictConfig) -> float | tuple[float, ...]:
    """Train what Hydra has composed; returns what a search goes by."""
    with pass_hydra():
        if current_process().name != "MainProcess":  # a worker of a sweep
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent hears of a terminal's
            follow_parent()
        elif int(os.environ.get("LOCAL_RANK", 0)):
            follow_parent()
        trust_modules(cfg.trust if OmegaConf.is_list(cfg.trust) else ())  # anything else is refused later
        hydra_cfg = HydraConfig.get()
        folder, words = Path(hydra_cfg.runtime.output_dir), hydra_cfg.overrides.task
        choices = hydra_cfg.runtime.choices
        if choices.get("sweep") and not is_multirun():
            raise OptionError(f"sweep={choices['sweep']} is of several runs: add -m, or leave it out")
        if is_multirun():  # where an option that nothing takes lets one run fail, and no other
            summary = note_failure(
                folder, lambda: run_in_sweep(remove_leftovers(cfg, words, choices), folder, train)
            )
        else:
            summary = train(continue_config(remove_leftovers(cfg, words, choices), folder), folder)
        return read_objectives(summary, cfg.objectives)


def main() -> None:
    if any(word in HELP for word in sys.argv[1:]):
        print(describe_training())
        return
    sys.argv[1:] = [rewrite(word) for word in sys.argv[1:]]
    check_words(sys.argv[1:])
    with let_hydra_start(), complete_sweep():
        run_job()


if __name__ == "__main__":
    from elastic.experiments.train import main as importable  # no other process could import `__main__`'s

    run(importable)
